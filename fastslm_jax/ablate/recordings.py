"""Long recordings of the synthetic corpus, for the experiments on long-form data.

FOLDER/train.jsonl has the sentences of recordings of 200 s, one a line, with voice and recording:
clips for any grouping. A recording has one voice, and one reverberation and noise.
FOLDER/test.jsonl has recordings of 0.5, 1, 3, 5 and 10 minutes.
"""

import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from fastslm_jax import cli, devices, outputs
from fastslm_jax.demo import corpus
from fastslm_jax.demo.recordings import SyntheticRecording
from fastslm_jax.synthesis import espeak
from fastslm_jax.synthesis.augment import CLEAN, Augmentation

SEED = 0
TRAIN = {200.0: 96}  # seconds: recordings
TEST = {30.0: 16, 60.0: 8, 180.0: 4, 300.0: 3, 600.0: 2}


def build(
    out: pathlib.Path,
    train: Mapping[float, int] = TRAIN,
    test: Mapping[float, int] = TEST,
    workers: int | None = None,
) -> None:
    """Builds the recordings in `out`, unless it has them: 6.4 hours, 0.5 GB.

    Args:
        train, test: {seconds: number of recordings}. They end up to one sentence earlier.
        workers: number of processes (default: one a core); the files do not depend on it.
    """
    if (out / "test.jsonl").exists():
        return
    espeak.check()
    recordings = [
        *_plan("train_recordings", train, Augmentation()),
        *_plan("test_recordings", test, CLEAN),
    ]
    for split in ("train", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
    built = corpus.build_all(recordings, out, workers or devices.cores())
    progress = cli.Bar(built, str(out), len(recordings), unit="recording", mininterval=2)
    rows = list(progress)
    count = sum(train.values())
    _write(out / "train.jsonl", itertools.chain.from_iterable(map(clips, rows[:count])))
    _write(out / "test.jsonl", rows[count:])  # last: it says that all is there


def _plan(
    name: str, counts: Mapping[float, int], augmentation: Augmentation
) -> list[SyntheticRecording]:
    lengths = [seconds for seconds, count in counts.items() for _ in range(count)]
    return [
        SyntheticRecording(SEED, name, "asr", index, augmentation, seconds)
        for index, seconds in enumerate(lengths)
    ]


def clips(row: corpus.Row) -> list[corpus.Row]:
    """The line of a recording → a line for each of its segments."""
    segments: Sequence[dict] = row["segments"]
    shared = {name: value for name, value in row.items() if name != "segments"}
    return [
        shared
        | {
            "id": f"{row['id']}-{number:03d}",
            "offset": segment["start"],
            "duration": round(segment["end"] - segment["start"], 3),
            "text": segment["text"],
            "answer": segment["text"],
        }
        for number, segment in enumerate(segments)
    ]


def _write(path: pathlib.Path, rows: Iterable[corpus.Row]) -> None:
    outputs.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
