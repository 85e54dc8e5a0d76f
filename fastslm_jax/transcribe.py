"""Answers audio files of any length with a checkpoint.

    python -m fastslm_jax.transcribe FILE|FOLDER|-… --checkpoint=WORKDIR [--task=asr|ast|ssum|sqqa] [--prompt=…]
        [--format=text|json|srt|vtt] [--out=FOLDER] [--span=auto|none|SECONDS] [--stream]

The config saved in the checkpoint says which bases it stands on. A folder gives all audio files below it, `-` is read from the
standard input. Subtitles have one entry for each span: coarse ones, cut at silence.
"""

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from absl import flags
from tqdm import tqdm

from fastslm_jax import audio, cli, devices
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.inference import load as loading
from fastslm_jax.inference import long_form
from fastslm_jax.inference.generator import Generator, bucketed_length
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.training.checkpoint import Checkpoints

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")
GROUP_SECONDS = 3600.0  # audio that is held at a time


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": flag_values}
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Working directory of a trained or imported model.",
        required=True,
        **options,
    )
    flags.DEFINE_integer("step", None, "Its checkpoint (default: the newest).", **options)
    flags.DEFINE_string(
        "whisper",
        None,
        "Folder or hub id of the speech encoder, if it is not where the config says.",
        **options,
    )
    flags.DEFINE_string(
        "llm",
        None,
        "Folder or hub id of the language model, if it is not where the config says.",
        **options,
    )
    flags.DEFINE_enum("task", "asr", sorted(TASKS), "What to do with the audio.", **options)
    flags.DEFINE_string(
        "prompt", None, "An instruction of your own (default: the task's).", **options
    )
    flags.DEFINE_enum(
        "format",
        "text",
        ["text", "json", "jsonl", "srt", "vtt"],
        "Text, a JSON object per line, or subtitles.",
        **options,
    )
    flags.DEFINE_string(
        "out",
        None,
        "Write FOLDER/NAME.txt, .json, .srt or .vtt for each file, not to the standard output.",
        **options,
    )
    flags.DEFINE_string(
        "span",
        "auto",
        "Seconds of a span of long recordings, none (one context), or auto.",
        **options,
    )
    flags.DEFINE_integer(
        "running_prompt",
        0,
        "Words of the transcript so far that the next span is given.",
        lower_bound=0,
        **options,
    )
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "The most new tokens of a span (default: grows with it).",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_integer(
        "batch_size",
        8,
        "Spans at a time; fewer where the context is long.",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_enum(
        "kv_cache",
        None,
        ["float32", "bfloat16", "int8"],
        "Type of the key-value cache (default: the model's).",
        **options,
    )
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", **options)
    flags.DEFINE_integer("top_k", 0, "Draw from the k best tokens only (0: all).", **options)
    flags.DEFINE_float(
        "top_p", 1.0, "Draw from the best tokens with this probability together only.", **options
    )
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "Above 1: tokens that were said become less likely.", **options
    )
    flags.DEFINE_integer("seed", 0, "Of the draws.", **options)
    flags.DEFINE_bool(
        "stream",
        None,
        "Write text as it comes (default: one file, as text, to a terminal).",
        **options,
    )


def find_files(names: Sequence[str], stdin_folder: pathlib.Path) -> list[pathlib.Path]:
    """Files named, audio files of folders, and `-` as a file of the standard input's bytes.

    Raises:
        UserError: nothing named, a name that is not there, or a folder without audio.
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
            "no audio file named: python -m fastslm_jax.transcribe FILE… --checkpoint=WORKDIR"
        )
    return files


# --------------------------------------------------------------------------------------------------------------- formats


def _clock(seconds: float, comma: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{comma}{rest % 1000:03}"


def subtitles(segments: Sequence[long_form.TranscriptSegment], kind: str) -> str:
    """SRT or WebVTT with an entry for each span that has text."""
    comma = "," if kind == "srt" else "."
    entries = [] if kind == "srt" else ["WEBVTT\n"]
    for number, segment in enumerate((s for s in segments if s.text), start=1):
        times = f"{_clock(segment.start, comma)} --> {_clock(segment.end, comma)}"
        entries.append(
            f"{number}\n{times}\n{segment.text}\n"
            if kind == "srt"
            else f"{times}\n{segment.text}\n"
        )
    return "\n".join(entries).rstrip("\n")


def record(
    name: str,
    task: str,
    seconds: float,
    result: long_form.Result,
    rtfx: float,
    compile_seconds: float,
) -> dict:
    """What --format=json says of a file."""
    return {
        "file": name,
        "text": result.text,
        "task": task,
        "seconds": round(seconds, 3),
        "windows": result.windows,
        "speech_tokens": result.speech_tokens,
        "covered_seconds": result.covered_seconds,
        "stop_reason": result.stop_reason,
        "new_tokens": result.new_tokens,
        "rtfx": round(rtfx, 2),
        "segments": [
            {
                "start": round(s.start, 3),
                "end": round(s.end, 3),
                "text": s.text,
                "stop_reason": s.stop_reason,
            }
            for s in result.segments
        ],
        "decoded_again": result.again,
        "first_token_seconds": result.first_token_seconds,
        "compile_seconds": round(compile_seconds, 2),
        "device": devices.name(),
        "peak_memory_gib": devices.peak_memory_gib(),
    }


class Stream:
    """Writes an answer as it grows; `text` is all of it so far."""

    def __init__(self):
        self.written = ""

    def __call__(self, _: int, text: str) -> None:
        text = text.rstrip("\ufffd")  # a character whose bytes have not all come
        if text.startswith(self.written):
            print(text[len(self.written) :], end="", flush=True)
            self.written = text

    def end(self, text: str) -> None:
        """The final text; on a line of its own if it is not what was written (a loop was mended)."""
        print(
            text[len(self.written) :] if text.startswith(self.written) else f"\n{text}", flush=True
        )


# ------------------------------------------------------------------------------------------------------------------ main


def groups(seconds: Sequence[float], limit: float = GROUP_SECONDS) -> Iterator[list[int]]:
    """Files in their order, up to `limit` seconds together."""
    members, total = [], 0.0
    for i, length in enumerate(seconds):
        if members and total + length > limit:
            yield members
            members, total = [], 0.0
        members.append(i)
        total += length
    if members:
        yield members


def load(options: flags.FlagValues) -> tuple[Generator, float]:
    """The model of a working directory, as the flags say, and the seconds of the longest recordings that it was trained on."""
    checkpoints = Checkpoints(options.checkpoint, read_only=True)
    step = loading.find_step(checkpoints, options.checkpoint, options.step)
    config = loading.saved_config(
        checkpoints, options.checkpoint, step, options.whisper, options.llm
    )
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    sampling = SamplingParams(
        options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed
    )
    generator = loading.load(
        config, checkpoints, step, cache_dtype=options.kv_cache, sampling=sampling
    )
    return generator, long_form.trained_seconds(config, generator.model.window.seconds)


def main(argv: Sequence[str], options: flags.FlagValues = flags.FLAGS) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = find_files(argv[1:], pathlib.Path(folder))
        seconds = [
            audio.probe(file) for file in files
        ]  # what cannot be read is refused before the model is loaded
        if options.format in ("srt", "vtt") and len(files) > 1 and not options.out:
            raise UserError(
                f"--format={options.format}: {len(files)} files need --out=FOLDER, a file of subtitles for each"
            )
        if options.out and len({out_path(options, file) for file in files}) < len(files):
            raise UserError(
                f"--out={options.out}: two of the audio files have the same name; transcribe them apart"
            )
        transcribe(options, *load(options), files, seconds)


def transcribe(
    options: flags.FlagValues,
    generator: Generator,
    trained: float,
    files: Sequence[pathlib.Path],
    seconds: Sequence[float],
) -> None:
    """Answers files of known lengths, as the flags say; `trained`: seconds of the longest recordings of the training."""
    what, limit = (options.task, options.prompt), options.max_new_tokens
    span_of = [
        long_form.span_for(generator, length, *what, trained, options.span, limit)
        for length in seconds
    ]
    needed = [
        long_form.needed_positions(generator, length, *what, span, limit)
        for length, span in zip(seconds, span_of, strict=True)
    ]
    streams = (
        options.stream
        if options.stream is not None
        else len(files) == 1 and sys.stdout.isatty() and not options.out
    )
    if streams and (options.format != "text" or len(files) > 1):
        raise UserError("--stream: is for one file and --format=text")
    stream = Stream() if streams else None
    with tqdm(
        total=round(sum(seconds)),
        unit="s",
        desc="audio",
        disable=streams or not sys.stderr.isatty(),
    ) as bar:
        for members in groups(seconds):
            jobs = [
                long_form.LongFormRequest(
                    audio.read_audio(files[i]),
                    *what,
                    span_of[i],
                    options.running_prompt,
                    options.max_new_tokens,
                )
                for i in members
            ]
            started, before = time.time(), devices.compiled_so_far()
            results = long_form.answer(
                generator,
                jobs,
                options.batch_size,
                slots=bucketed_length(max(needed)),
                progress=bar.update,
                on_text=stream,
            )
            compiling = (devices.compiled_so_far() - before).seconds
            rtfx = sum(job.seconds for job in jobs) / max(time.time() - started - compiling, 1e-9)
            for i, job, result in zip(members, jobs, results, strict=True):
                if stream:
                    stream.end(result.text)
                else:
                    described = record(
                        shown(files[i]), options.task, job.seconds, result, rtfx, compiling
                    )
                    write(options, files[i], described, result, len(files))
                warn(files[i], result)


def shown(file: pathlib.Path) -> str:
    return "-" if file.name == "-" else str(file)


def write(
    options: flags.FlagValues,
    file: pathlib.Path,
    described: dict,
    result: long_form.Result,
    num_files: int,
) -> None:
    """One answer, to the standard output or its own file."""
    if options.format in ("json", "jsonl"):
        text = json.dumps(described, ensure_ascii=False)
    elif options.format in ("srt", "vtt"):
        text = subtitles(result.segments, options.format)
    else:
        text = result.text if num_files == 1 or options.out else f"{shown(file)}\t{result.text}"
    if not options.out:
        print(text, flush=True)
        return
    path = out_path(options, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def out_path(options: flags.FlagValues, file: pathlib.Path) -> pathlib.Path:
    suffix = {"text": "txt", "jsonl": "json"}.get(options.format, options.format)
    return pathlib.Path(options.out) / f"{'stdin' if file.name == '-' else file.stem}.{suffix}"


def warn(file: pathlib.Path, result: long_form.Result) -> None:
    """Says aloud what an answer lacks."""
    if result.stop_reason == "budget":
        print(
            f"{shown(file)}: an answer was cut at its budget of tokens; raise --max_new_tokens",
            file=sys.stderr,
        )
    if result.stop_reason == "loop":
        print(
            f"{shown(file)}: an answer repeated itself; its repetitions were left out",
            file=sys.stderr,
        )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
