"""Transcribes, translates, summarizes or answers questions about audio files of any length.

    python -m fastslm_jax.transcribe FILE|FOLDER|-… --checkpoint=WORKDIR [--prompt=…] [--context=…]
        [--task=asr|ast|ssum|sqqa] [--format=text|json|srt|vtt] [--out=FOLDER]
        [--span=auto|none|SECONDS] [--stream]

The config in the checkpoint names its pretrained models. A folder means all audio files below it,
and `-` means standard input. Subtitles have one entry per segment, cut at
silence.
"""

from absl import flags

from fastslm_jax import cli
from fastslm_jax.transcribe_flags import define_flags

if __name__ == "__main__":
    define_flags()
    cli.parse_flags()  # before the imports below, which take seconds

import contextlib
import functools
import html
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from fastslm_jax import audio, audio_files, devices, outputs
from fastslm_jax.data.tasks import with_context
from fastslm_jax.errors import UserError
from fastslm_jax.inference import api, long_form
from fastslm_jax.inference.generator import Generator
from fastslm_jax.inference.long_form import Recording, Result, TranscriptSegment
from fastslm_jax.inference.sampling import SamplingParams

SUFFIXES = audio_files.SUFFIXES
MIN_CUE_SECONDS = 0.5  # of a subtitle whose segment has no length
EXTENSIONS = {"text": "txt", "jsonl": "json"}  # of output files; others equal the format


def _is_audio(file: pathlib.Path) -> bool:
    """Whether a file in a folder is audio by its name, and not hidden as macOS's additions are."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


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
            path.write_bytes(read_stdin())
            files.append(path)
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_audio(file))
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


def read_stdin() -> bytes:
    """The audio file on standard input.

    Raises:
        UserError: it is closed, a terminal, or empty.
    """
    if sys.stdin is None:
        raise UserError("-: standard input is closed; pipe an audio file into it")
    if sys.stdin.buffer.isatty():
        raise UserError("-: standard input is a terminal; pipe an audio file into it")
    content = sys.stdin.buffer.read()
    if not content:
        raise UserError("-: standard input is empty; pipe an audio file into it")
    return content


# -------------------------------------------------------------------------------------- formats


def _clock(seconds: float, decimal: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{decimal}{rest % 1000:03}"


def subtitles(segments: Sequence[TranscriptSegment], kind: str) -> str:
    """SRT or WebVTT with a cue for each segment that has text.

    Cues do not overlap; one without length gets MIN_CUE_SECONDS.
    """
    decimal = "," if kind == "srt" else "."
    cues = [(segment, text) for segment in segments if (text := _cue_text(segment.text, kind))]
    entries, end = [] if kind == "srt" else ["WEBVTT\n"], 0.0
    for number, (segment, text) in enumerate(cues, start=1):
        start = max(round(segment.start, 3), end)
        end = round(segment.end, 3)
        if end <= start:
            end = start + MIN_CUE_SECONDS
        if number < len(cues) and (following := round(cues[number][0].start, 3)) > start:
            end = min(end, following)
        times = f"{_clock(start, decimal)} --> {_clock(end, decimal)}"
        head = f"{number}\n{times}" if kind == "srt" else times
        entries.append(f"{head}\n{text}\n")
    return "\n".join(entries).rstrip("\n")


def _cue_text(text: str, kind: str) -> str:
    """Text without what would end or change a cue: blank lines, arrows and, in WebVTT, tags."""
    lines = (" ".join(line.split()) for line in text.replace("\0", "").splitlines())
    text = "\n".join(line for line in lines if line)
    return html.escape(text, quote=False) if kind == "vtt" else text.replace("-->", "→")


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
    model = api.load(
        options.checkpoint,
        options.step,
        options.whisper,
        options.llm,
        options.kv_cache,
        sampling(options),
        options.other_bases,
    )
    return model.generator, model.trained_seconds


def sampling(options: flags.FlagValues) -> SamplingParams:
    """The sampling flags. Raises UserError if one is out of range."""
    return SamplingParams(
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.seed,
    )


class Failures:
    """Files that cannot be answered. With several files, the others are answered all the same."""

    def __init__(self, num_files: int) -> None:
        self.num_files, self.count = num_files, 0

    def add(self, file: pathlib.Path, error: UserError | OSError | UnicodeError) -> None:
        """Names a file that failed on standard error; if it is the only file, raises its error."""
        if self.num_files == 1:
            raise error
        self.count += 1
        text = cli.describe(error)
        name = display_name(file)
        cli.report(text if name in text else f"{name}: {text}")

    @contextlib.contextmanager
    def caught(self, file: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except (UserError, OSError, UnicodeError) as error:
            self.add(file, error)

    def check(self) -> None:
        """Raises UserError if any file failed."""
        if self.count:
            raise UserError(f"{self.count} of {self.num_files} files failed, as named above")


def main(argv: Sequence[str], options: flags.FlagValues = flags.FLAGS) -> None:
    # Whatever can be wrong is rejected before the model is loaded.
    long_form.parse_span(options.span)
    sampling(options)
    with tempfile.TemporaryDirectory() as folder:
        files = find_files(argv[1:], pathlib.Path(folder))
        check_output(options, files)
        failures, recordings = Failures(len(files)), []
        for file in files:
            with failures.caught(file):
                recordings.append((file, _recording(options, file)))
        if recordings:
            transcribe(options, *load(options), recordings, failures)
        failures.check()


def check_output(options: flags.FlagValues, files: Sequence[pathlib.Path]) -> None:
    """Raises UserError if the answers cannot be written."""
    if options.stream and (options.format != "text" or len(files) > 1):
        raise UserError("--stream: works with one file and --format=text")
    if not options.out:
        if sys.stdout is None:
            raise UserError("standard output is closed; use --out=FOLDER")
        if options.format in ("srt", "vtt") and len(files) > 1:
            raise UserError(
                f"--format={options.format}: {len(files)} files need --out=FOLDER, "
                "for one subtitle file each"
            )
        return
    paths = [out_path(options, file) for file in files]
    if len(set(paths)) < len(files):
        raise UserError(
            f"--out={options.out}: two audio files have the same name; transcribe them separately"
        )
    outputs.check_folder(options.out, "--out")
    for path in paths:
        outputs.check_file(path, "--out")


def _recording(options: flags.FlagValues, file: pathlib.Path) -> Recording:
    return Recording(
        audio.probe(file),
        functools.partial(audio.read_audio, file),
        options.task,
        with_context(options.task, options.prompt, options.context.strip()),
        context_words=options.running_prompt,
        max_new_tokens=options.max_new_tokens,
    )


def transcribe(
    options: flags.FlagValues,
    generator: Generator,
    trained: float,
    recordings: Sequence[tuple[pathlib.Path, Recording]],
    failures: Failures,
) -> None:
    """Answers files; `trained`: length in seconds of the longest training recordings."""
    files, fitting = [], []
    for file, recording in recordings:
        with failures.caught(file):
            fitting.append(
                long_form.with_segments(generator.capacity, recording, trained, options.span)
            )
            files.append(file)
    streams = options.stream
    if streams is None:  # the default: one file, as text, to a terminal
        is_text = options.format == "text" and not options.out
        streams = failures.num_files == 1 and is_text and sys.stdout.isatty()
    terminal = TerminalStream()
    covered = [0.0] * len(files)
    started, compiled_before = time.perf_counter(), devices.compiled_so_far()
    hide = streams or not sys.stderr.isatty()
    with cli.AudioBar(sum(recording.seconds for recording in fitting), "audio", hide=hide) as bar:
        for i, result in long_form.stream(
            generator,
            fitting,
            batch_size=options.batch_size,
            in_order=True,
            partial=streams,
            failed=lambda i, error: failures.add(files[i], error),
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
                write(options, files[i], result, num_files=failures.num_files)
            warn(files[i], result)
    compiling = (devices.compiled_so_far() - compiled_before).seconds
    running = max(0.0, time.perf_counter() - started - compiling)
    summary = f"{sum(covered):.1f} s of audio in {running:.1f} s on {devices.name()}"
    cli.report(f"{summary}, after {compiling:.1f} s of compilation", prefix="")


def display_name(file: pathlib.Path) -> str:
    return "-" if file.name == "-" else cli.display_name(file)


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
    if options.out:
        outputs.write_text(out_path(options, file), text + "\n")
    else:
        cli.print_above_bars(text, sys.stdout)


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
    cli.print_above_bars(f"{display_name(file)}: {problem}", sys.stderr)


if __name__ == "__main__":
    cli.run(main)
