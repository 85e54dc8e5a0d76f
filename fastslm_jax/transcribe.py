"""Transcribes, translates, summarizes or answers questions about audio files of any length.

    python -m fastslm_jax.transcribe FILE|FOLDER|-… --checkpoint=WORKDIR [--prompt=…]
        [--task=asr|ast|ssum|sqqa] [--format=text|json|srt|vtt] [--out=FOLDER]
        [--span=auto|none|SECONDS] [--stream]

The config in the checkpoint names its pretrained models. A folder means all audio files below it,
and `-` means standard input. Subtitles have one entry per segment, cut at
silence.
"""

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import flags
from tqdm import tqdm

from fastslm_jax import audio, cli, devices
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.inference import api, long_form
from fastslm_jax.inference.generator import Generator
from fastslm_jax.inference.long_form import Recording, Result, TranscriptSegment
from fastslm_jax.inference.sampling import SamplingParams

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")
EXTENSIONS = {"text": "txt", "jsonl": "json"}  # of output files; others equal the format


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    string, integer, number, enum = (
        functools.partial(define, flag_values=flag_values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_enum,
        )
    )
    string("checkpoint", None, "Working directory of a trained or imported model.", required=True)
    integer("step", None, "Step of the checkpoint (default: the newest).")
    string("whisper", None, "Folder or hub id of the speech encoder (default: the config's).")
    string("llm", None, "Folder or hub id of the language model (default: the config's).")
    enum("task", "asr", sorted(TASKS), "What to do with the audio.")
    string("prompt", None, "An instruction that replaces the task's default.")
    enum(
        "format",
        "text",
        ["text", "json", "jsonl", "srt", "vtt"],
        "Text, one JSON object per line, or subtitles.",
    )
    string(
        "out",
        None,
        "Folder for one NAME.txt, .json, .srt or .vtt per file (default: standard output).",
    )
    string(
        "span",
        "auto",
        "Length of the segments that long recordings are cut into: seconds, none, or auto.",
    )
    integer(
        "running_prompt",
        0,
        "Words of the transcript so far to quote in the next segment's prompt.",
        lower_bound=0,
    )
    integer(
        "max_new_tokens",
        None,
        "Token budget of each segment (default: grows with its length).",
        lower_bound=1,
    )
    integer("batch_size", 8, "Segments per batch; fewer if the context is long.", lower_bound=1)
    enum(
        "kv_cache",
        None,
        ["float32", "bfloat16", "int8"],
        "Type of the key-value cache (default: the model's).",
    )
    number("temperature", 0.0, "Sampling temperature; 0 is greedy.")
    integer("top_k", 0, "Sample only from the k most likely tokens (0: all).")
    number("top_p", 1.0, "Sample only from the most likely tokens with this total probability.")
    number("repetition_penalty", 1.0, "Values above 1 make tokens less likely to be repeated.")
    integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_bool(
        "stream",
        None,
        "Print text as it is generated (default: for one file, as text, to a terminal).",
        flag_values=flag_values,
    )


def find_files(names: Sequence[str], stdin_folder: pathlib.Path) -> list[pathlib.Path]:
    """The named files, the audio files of named folders, and a copy of standard input for `-`.

    Raises:
        UserError: nothing is named, or a folder contains no audio.
    """
    files = []
    for name in names:
        path = pathlib.Path(name)
        if name == "-":
            path = stdin_folder / "-"
            path.write_bytes(sys.stdin.buffer.read())
            files.append(path)
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{path}: no audio file in this folder ({', '.join(SUFFIXES)})")
            files += found
        else:
            files.append(path)
    if not files:
        raise UserError(
            "no audio file given: python -m fastslm_jax.transcribe FILE… --checkpoint=WORKDIR"
        )
    return files


# -------------------------------------------------------------------------------------- formats


def _clock(seconds: float, decimal: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{decimal}{rest % 1000:03}"


def subtitles(segments: Sequence[TranscriptSegment], kind: str) -> str:
    """SRT or WebVTT with an entry for each segment that has text."""
    decimal = "," if kind == "srt" else "."
    entries = [] if kind == "srt" else ["WEBVTT\n"]
    for number, segment in enumerate((s for s in segments if s.text), start=1):
        times = f"{_clock(segment.start, decimal)} --> {_clock(segment.end, decimal)}"
        head = f"{number}\n{times}" if kind == "srt" else times
        entries.append(f"{head}\n{segment.text}\n")
    return "\n".join(entries).rstrip("\n")


def record(name: str, task: str, result: Result) -> dict:
    """The JSON object of a file."""
    return {
        "file": name,
        "text": result.text,
        "task": task,
        "seconds": round(result.seconds, 3),
        "windows": result.windows,
        "speech_tokens": result.speech_tokens,
        "covered_seconds": result.covered_seconds,
        "stop_reason": result.stop_reason,
        "new_tokens": result.new_tokens,
        "rtfx": round(result.rtfx, 2),
        "segments": [
            {
                "start": round(segment.start, 3),
                "end": round(segment.end, 3),
                "text": segment.text,
                "stop_reason": segment.stop_reason,
            }
            for segment in result.segments
        ],
        "decoded_again": result.again,
        "first_token_seconds": result.first_token_seconds,
        "compile_seconds": round(result.compile_seconds, 2),
        "device": devices.name(),
        "peak_memory_gib": devices.peak_memory_gib(),
    }


class TerminalStream:
    """Prints an answer as it grows."""

    def __init__(self):
        self.written = ""

    def update(self, text: str) -> None:
        text = text.rstrip("\ufffd")  # a character whose bytes are incomplete
        if text.startswith(self.written):
            print(text[len(self.written) :], end="", flush=True)
            self.written = text

    def end(self, text: str) -> None:
        """Prints the rest, or the whole text if it differs (a repetition loop was cut)."""
        rest = text[len(self.written) :] if text.startswith(self.written) else f"\n{text}"
        print(rest, flush=True)


# ----------------------------------------------------------------------------------------- main


def load(options: flags.FlagValues) -> tuple[Generator, float]:
    """The generator, and the length in seconds of the longest recordings in its training."""
    sampling = SamplingParams(
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.seed,
    )
    model = api.load(
        options.checkpoint, options.step, options.whisper, options.llm, options.kv_cache, sampling
    )
    return model.generator, model.trained_seconds


def main(argv: Sequence[str], options: flags.FlagValues = flags.FLAGS) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = find_files(argv[1:], pathlib.Path(folder))
        # Unreadable files are rejected before the model is loaded.
        recordings = [_recording(options, file) for file in files]
        if options.format in ("srt", "vtt") and len(files) > 1 and not options.out:
            raise UserError(
                f"--format={options.format}: {len(files)} files need --out=FOLDER, "
                "for one subtitle file each"
            )
        if options.out and len({out_path(options, file) for file in files}) < len(files):
            raise UserError(
                f"--out={options.out}: two audio files have the same name; "
                "transcribe them separately"
            )
        transcribe(options, *load(options), files, recordings)


def _recording(options: flags.FlagValues, file: pathlib.Path) -> Recording:
    return Recording(
        audio.probe(file),
        functools.partial(audio.read_audio, file),
        options.task,
        options.prompt,
        context_words=options.running_prompt,
        max_new_tokens=options.max_new_tokens,
    )


def transcribe(
    options: flags.FlagValues,
    generator: Generator,
    trained: float,
    files: Sequence[pathlib.Path],
    recordings: Sequence[Recording],
) -> None:
    """Answers files; `trained`: length in seconds of the longest training recordings."""
    recordings = [
        long_form.with_segments(generator.capacity, recording, trained, options.span)
        for recording in recordings
    ]
    to_terminal = len(files) == 1 and sys.stdout.isatty() and not options.out
    streams = options.stream if options.stream is not None else to_terminal
    if streams and (options.format != "text" or len(files) > 1):
        raise UserError("--stream: works with one file and --format=text")
    terminal = TerminalStream()
    total = round(sum(recording.seconds for recording in recordings))
    covered = [0.0] * len(files)
    hide = streams or not sys.stderr.isatty()
    with tqdm(total=total, unit="s", desc="audio", disable=hide) as bar:
        for i, result in long_form.stream(
            generator, recordings, batch_size=options.batch_size, in_order=True, partial=streams
        ):
            bar.update(result.covered_seconds - covered[i])
            covered[i] = result.covered_seconds
            if streams:
                terminal.update(result.text)
            if result.stop_reason is None:
                continue
            if streams:
                terminal.end(result.text)
            else:
                write(options, files[i], result, num_files=len(files))
            warn(files[i], result)


def display_name(file: pathlib.Path) -> str:
    return "-" if file.name == "-" else str(file)


def write(
    options: flags.FlagValues,
    file: pathlib.Path,
    result: Result,
    num_files: int,
) -> None:
    """Writes one answer to standard output or to a file."""
    if options.format in ("json", "jsonl"):
        text = json.dumps(record(display_name(file), options.task, result), ensure_ascii=False)
    elif options.format in ("srt", "vtt"):
        text = subtitles(result.segments, options.format)
    else:
        is_alone = num_files == 1 or options.out
        text = result.text if is_alone else f"{display_name(file)}\t{result.text}"
    if not options.out:
        print(text, flush=True)
        return
    path = out_path(options, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def out_path(options: flags.FlagValues, file: pathlib.Path) -> pathlib.Path:
    name = "stdin" if file.name == "-" else file.stem
    return pathlib.Path(options.out) / f"{name}.{EXTENSIONS.get(options.format, options.format)}"


def warn(file: pathlib.Path, result: Result) -> None:
    """Reports an incomplete answer on standard error."""
    if result.stop_reason == "budget":
        problem = "an answer was cut at its token budget; raise --max_new_tokens"
    elif result.stop_reason == "loop":
        problem = "an answer repeated itself; the repetitions were removed"
    else:
        return
    print(f"{display_name(file)}: {problem}", file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
