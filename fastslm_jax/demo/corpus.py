"""Builds the demo's synthetic speech corpus: FLAC files and JSON-lines manifests.

    python -m fastslm_jax.demo.corpus --out=runs/corpus

espeak-ng voices speak the sentences of `examples`. The default corpus has 9 900 clips (10.7 hours,
0.7 GB) and takes about a minute on two cores.

DIR/train.jsonl, dev.jsonl, test.jsonl, test_unseen_voices.jsonl and test_long.jsonl have one
example per line; `audio_filepath` is relative to DIR. Splits share no sentence.
`test_unseen_voices` has (accent, variant) pairs that are not in training. `test_long` joins
sentences of one voice into recordings of one to three minutes, with the time and text of each in
`segments`. DIR/train_transcripts.jsonl has the transcripts of train's summary and question
recordings.

The files do not depend on the number of workers. An interrupted build resumes when run again;
manifests are written last.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import soundfile
from absl import flags

from fastslm_jax import cli, outputs
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import examples
from fastslm_jax.demo.recordings import SyntheticRecording, render, render_long
from fastslm_jax.demo.voices import voices
from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import espeak
from fastslm_jax.synthesis.augment import CLEAN, Augmentation

Row = dict[str, object]  # one line of a manifest
Counts = Mapping[str, Mapping[str, int]]  # set -> task -> number of examples

TRANSCRIPTS = "train_transcripts.jsonl"
DEFAULT_COUNTS: Counts = {
    "train": {"asr": 5000, "ast": 1500, "ssum": 600, "sqqa": 3200},
    "dev": {"asr": 100, "ast": 100, "ssum": 100, "sqqa": 100},
    "test": {"asr": 200, "ast": 100, "ssum": 100, "sqqa": 300},
    "test_unseen_voices": {"asr": 200},
    "test_long": {"asr": 12},
}
# Targets of the shortest and longest of test_long. A recording ends up to one sentence earlier,
# so they last 60 to 180 s.
LONG_SECONDS = (67.0, 180.0)
VERSION = 2  # of the audio recipe: increment it when the same seed gives different samples

FLAGS = flags.FLAGS


def build_corpus(
    out: str | os.PathLike[str],
    seed: int = 0,
    counts: Counts | None = None,
    workers: int = 2,
    train: Augmentation = Augmentation(),
    evaluation: Augmentation = CLEAN,
) -> None:
    """Builds the corpus in `out`, or resumes an interrupted build.

    Args:
        out: output folder.
        seed: seed of all random draws.
        counts: {set: {task: examples}}, overriding `DEFAULT_COUNTS`.
        workers: number of processes; the files do not depend on it.
        train: augmentation of the training set.
        evaluation: augmentation of all other sets.

    Raises:
        UserError: invalid arguments, or `out` has a corpus with other settings.
    """
    if workers < 1:
        raise UserError(f"workers must be 1 or more, not {workers}")
    out, counts = pathlib.Path(out), _with_defaults(counts)
    recordings = _recordings(seed, counts, train, evaluation)
    _claim(out, _settings(seed, counts, train, evaluation))
    if _is_complete(out, recordings):
        print(f"{out}: complete, {len(recordings)} audio files")
        return
    espeak.check()
    rows: dict[str, dict[str, list[Row]]] = {
        name: {task: [] for task in tasks} for name, tasks in counts.items()
    }
    # Long recordings take seconds each: first, so that no worker is still busy with one at the end.
    order = sorted(recordings, key=lambda recording: -recording.target_seconds)
    built = build_all(order, out, workers)
    progress = cli.Bar(built, str(out), len(order), unit="clip", mininterval=2)
    for recording, row in zip(order, progress, strict=True):
        rows[recording.set_name][recording.task].append(row)
    _write_manifests(out, seed, counts, rows)


def _with_defaults(counts: Counts | None) -> dict[str, dict[str, int]]:
    """`DEFAULT_COUNTS`, overridden by `counts`."""
    merged = {name: dict(tasks) for name, tasks in DEFAULT_COUNTS.items()}
    for name, tasks in (counts or {}).items():
        for task, count in tasks.items():
            if task not in merged.get(name, {}):
                sets = "; ".join(f"{n}: {', '.join(t)}" for n, t in DEFAULT_COUNTS.items())
                raise UserError(f"no examples of task {task!r} in set {name!r}; sets are {sets}")
            if count < 0:
                raise UserError(f"number of {name} {task} examples must be 0 or more, not {count}")
            merged[name][task] = count
    return merged


def _recordings(
    seed: int, counts: Counts, train: Augmentation, evaluation: Augmentation
) -> list[SyntheticRecording]:
    """All audio files. The first translations reuse the audio of the transcription examples."""
    recordings = []
    for name, tasks in counts.items():
        augmentation = train if name == "train" else evaluation
        for task, count in tasks.items():
            first = min(tasks["asr"], count) if task == "ast" else 0
            for index in range(first, count):
                target = _long_seconds(index, count) if name == "test_long" else 0.0
                recordings.append(SyntheticRecording(seed, name, task, index, augmentation, target))
    return recordings


def _long_seconds(index: int, count: int) -> float:
    low, high = LONG_SECONDS
    return high if count == 1 else low + (high - low) * index / (count - 1)


def _settings(
    seed: int, counts: Counts, train: Augmentation, evaluation: Augmentation
) -> dict[str, object]:
    """What determines the corpus, with a hash of the text generator and the voices."""
    drawn = [dataclasses.astuple(example) for example in examples.text_examples("train", 0, 200)]
    speakers = [voice.speaker for group in voices() for voice in group]
    recipe = hashlib.sha256(json.dumps([drawn, speakers]).encode()).hexdigest()[:16]
    return {
        "version": VERSION,
        "recipe": recipe,
        "seed": seed,
        "counts": counts,
        "train": dataclasses.asdict(train),
        "evaluation": dataclasses.asdict(evaluation),
    }


def _claim(out: pathlib.Path, settings: Mapping[str, object]) -> None:
    """Records the settings in a new folder; a corpus with other settings is an error."""
    path = out / "settings.json"
    if path.exists():
        existing = json.loads(path.read_text(encoding="utf-8"))
        if existing != settings:
            different = [key for key in settings if existing.get(key) != settings[key]]
            raise UserError(
                f"{out} has a corpus with other settings ({', '.join(different)}); "
                "delete it or choose another --out"
            )
        return
    for folder in examples.SPLITS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    outputs.write_text(path, json.dumps(settings, indent=1) + "\n")


def _is_complete(out: pathlib.Path, recordings: Sequence[SyntheticRecording]) -> bool:
    present = {
        f"{folder}/{name}"
        for folder in examples.SPLITS
        if (out / folder).is_dir()
        for name in os.listdir(out / folder)
    }
    manifests = [out / TRANSCRIPTS, *(out / f"{name}.jsonl" for name in DEFAULT_COUNTS)]
    return all(manifest.exists() for manifest in manifests) and all(
        recording.path in present for recording in recordings
    )


def build_all(
    recordings: Sequence[SyntheticRecording], out: pathlib.Path, workers: int
) -> Iterable[Row]:
    build = functools.partial(_build_recording, out=out)
    if workers == 1:
        yield from map(build, recordings)
        return
    # Processes, not threads: espeak-ng is not thread-safe.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(build, recordings, chunksize=16)


def _build_recording(recording: SyntheticRecording, out: pathlib.Path) -> Row:
    """Writes the audio file unless it exists; returns its manifest line."""
    path = out / recording.path
    if recording.target_seconds:  # rendered again even if it exists: the row needs its segments
        samples, segments = render_long(recording)
        _write_flac(path, samples)
        text = " ".join(str(segment["text"]) for segment in segments)
        example = examples.SpokenExample("asr", text, TASKS["asr"].instruction, text)
        return {**_row(recording, example, len(samples)), "segments": segments}
    if path.exists():
        num_samples = soundfile.info(path).frames
    else:
        samples = render(recording)
        _write_flac(path, samples)
        num_samples = len(samples)
    return _row(recording, recording.example(), num_samples)


def _row(recording: SyntheticRecording, example: examples.SpokenExample, num_samples: int) -> Row:
    return {
        "id": f"{recording.set_name}-{example.task}-{recording.index:06d}",
        "audio_filepath": recording.path,
        "duration": num_samples / SAMPLE_RATE,
        "text": example.text,
        "task": example.task,
        "prompt": example.prompt,
        "answer": example.answer,
        "lang": example.lang,
        "speaker": recording.voice().speaker,
        "recording": recording.key,
    }


def _shared_translation(seed: int, name: str, index: int, asr: Row) -> Row:
    """A translation example on the audio of a transcription example."""
    drawn = examples.draw_example("ast", SyntheticRecording(seed, name, "asr", index).rng(), name)
    if drawn.text != asr["text"]:
        raise AssertionError(f"{asr['id']}: {asr['text']!r} was translated as {drawn.text!r}")
    return {
        **asr,
        "id": f"{name}-ast-{index:06d}",
        "task": "ast",
        "prompt": drawn.prompt,
        "answer": drawn.answer,
        "lang": drawn.lang,
    }


def _transcript(row: Row) -> Row:
    """A transcription example on the audio of another task."""
    return {
        **row,
        "id": f"{row['id']}-asr",
        "task": "asr",
        "prompt": TASKS["asr"].instruction,
        "answer": row["text"],
        "lang": "en",
    }


def _write_manifests(
    out: pathlib.Path, seed: int, counts: Counts, rows: Mapping[str, Mapping[str, list[Row]]]
) -> None:
    """Writes a manifest per set from the rows of its recordings, and the transcripts."""
    written = []
    for name, tasks in rows.items():
        for of_task in tasks.values():
            of_task.sort(key=lambda row: str(row["id"]))
        if "ast" in tasks:
            shared = tasks["asr"][: counts[name]["ast"]]
            tasks["ast"][:0] = [
                _shared_translation(seed, name, index, asr) for index, asr in enumerate(shared)
            ]
        examples_of_set = [row for of_task in tasks.values() for row in of_task]
        _write_manifest(out / f"{name}.jsonl", examples_of_set)
        hours = sum(float(row["duration"]) for row in examples_of_set) / 3600
        written.append(f"{name} {len(examples_of_set)} ({hours:.1f} h)")
    spoken = [*rows["train"]["ssum"], *rows["train"]["sqqa"]]
    _write_manifest(out / TRANSCRIPTS, [_transcript(row) for row in spoken])
    print(f"{out}: examples of {', '.join(written)}")


def _write_manifest(path: pathlib.Path, rows: Sequence[Row]) -> None:
    outputs.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_flac(path: pathlib.Path, samples: np.ndarray) -> None:
    """Atomic: an interrupted build leaves a temporary file, which the next one overwrites."""
    temporary = path.with_name(f".{path.name}.tmp")
    soundfile.write(temporary, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    os.replace(temporary, path)


def define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder of the corpus.", required=True)
    flags.DEFINE_integer("seed", 0, "Seed of all random draws.")
    flags.DEFINE_integer("workers", 2, "Number of processes.", lower_bound=1)
    _define_count("utterances", "Transcription examples in train.", "train", "asr")
    _define_count("dev", "Examples of each task in dev.", "dev", "asr")
    for task in ("ast", "ssum", "sqqa"):
        _define_count(f"train_{task}", f"Examples of task {task} in train.", "train", task)
    for task in TASKS:
        _define_count(f"test_{task}", f"Examples of task {task} in test.", "test", task)
    for name in ("test_unseen_voices", "test_long"):
        _define_count(name, f"Recordings in {name}.", name, "asr")
    for prefix, default in (("train", Augmentation()), ("eval", CLEAN)):
        for name, probability in dataclasses.asdict(default).items():
            flags.DEFINE_float(
                f"{prefix}_{name}",
                probability,
                f"Probability of {name} in an utterance.",
                lower_bound=0.0,
                upper_bound=1.0,
            )


def _define_count(flag: str, description: str, name: str, task: str) -> None:
    flags.DEFINE_integer(flag, DEFAULT_COUNTS[name][task], description, lower_bound=0)


def _augmentation_from_flags(prefix: str) -> Augmentation:
    names = [field.name for field in dataclasses.fields(Augmentation)]
    return Augmentation(**{name: FLAGS[f"{prefix}_{name}"].value for name in names})


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value")
    counts = {
        "train": {"asr": FLAGS.utterances}
        | {task: FLAGS[f"train_{task}"].value for task in ("ast", "ssum", "sqqa")},
        "dev": dict.fromkeys(TASKS, FLAGS.dev),
        "test": {task: FLAGS[f"test_{task}"].value for task in TASKS},
        "test_unseen_voices": {"asr": FLAGS.test_unseen_voices},
        "test_long": {"asr": FLAGS.test_long},
    }
    train, evaluation = (_augmentation_from_flags(prefix) for prefix in ("train", "eval"))
    try:
        build_corpus(FLAGS.out, FLAGS.seed, counts, FLAGS.workers, train, evaluation)
    except OSError as error:
        raise UserError(f"cannot write the corpus: {error}") from error


if __name__ == "__main__":
    define_flags()
    cli.run(main)
