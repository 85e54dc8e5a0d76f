"""Labeled speech batches that train the demo's encoder."""

import dataclasses
import functools
import json
import multiprocessing
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from fastslm_jax import audio, cli, devices
from fastslm_jax.demo import corpus
from fastslm_jax.demo.recordings import SyntheticRecording, word_times
from fastslm_jax.synthesis.augment import Augmentation

FEATURE_SAMPLES = 320  # audio samples per encoder feature: 50 features per second
CHARACTERS = " abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass
class Clips:
    """Utterances: samples, texts, and the word id at every feature (0: no word)."""

    samples: list[np.ndarray]
    texts: list[str]
    frames: list[np.ndarray]


def read_clips(
    folder: pathlib.Path, split: str, vocabulary: Mapping[str, int], limit: int | None = None
) -> Clips:
    """Reads the transcription examples of a split; for train, also those of other tasks' audio.

    Word times are not stored: each utterance is synthesized again to get them.

    Args:
        folder: the corpus.
        split: train or dev.
        vocabulary: word -> id, from 1.
        limit: number of utterances; None: all.
    """
    manifests = [folder / f"{split}.jsonl"]
    if split == "train":
        manifests.append(folder / corpus.TRANSCRIPTS)
    rows = [
        json.loads(line)
        for manifest in manifests
        for line in manifest.read_text(encoding="utf-8").splitlines()
    ]
    rows = [row for row in rows if row["task"] == "asr"][:limit]
    samples = [
        audio.read_audio(folder / row["audio_filepath"])
        for row in cli.Bar(rows, desc=f"read {split}", mininterval=5)
    ]
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    augmentation = Augmentation(**settings["train" if split == "train" else "evaluation"])
    recordings = []
    for row in rows:
        name, task, index = row["recording"].split("-")
        recordings.append(
            SyntheticRecording(settings["seed"], name, task, int(index), augmentation)
        )
    words_of = functools.partial(_word_at_features, vocabulary=vocabulary)
    with multiprocessing.get_context("spawn").Pool(devices.cores()) as pool:
        frames = list(
            cli.Bar(
                pool.imap(words_of, recordings, chunksize=64),
                desc=f"word times of {split}",
                total=len(recordings),
                mininterval=5,
            )
        )
    return Clips(samples, [row["text"] for row in rows], frames)


def _word_at_features(recording: SyntheticRecording, vocabulary: Mapping[str, int]) -> np.ndarray:
    """Word ids [features] of a recording."""
    times = word_times(recording)
    words = np.zeros(int(np.ceil(times[-1][2] * audio.SAMPLE_RATE / FEATURE_SAMPLES)), np.int32)
    for word, start, end in times:
        first, last = (int(second * audio.SAMPLE_RATE / FEATURE_SAMPLES) for second in (start, end))
        words[first:last] = vocabulary.get(word, 0)
    return words


def pad_labels(labels: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Label sequences, padded with zeros: [batch, length] int32."""
    out = np.zeros((len(labels), length), np.int32)
    for row, label in enumerate(labels):
        out[row, : len(label)] = label
    return out


@dataclasses.dataclass
class StreamBatches:
    """Batches whose rows have `windows` windows: one stream of clips, or a clip per window."""

    clips: Clips
    vocabulary: Mapping[str, int]
    spec: audio.WindowSpec
    windows: int = 2
    batch: int = 4

    def __post_init__(self) -> None:
        self._short = [
            i for i, clip in enumerate(self.clips.samples) if self.spec.count(len(clip)) == 1
        ]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draws one batch.

        Returns:
            windows [batch, windows, samples], valid frames and recording ids [batch, windows],
            character and word labels [batch, labels] (0: blank and padding), and the word id at
            every feature [batch, windows * 300].
        """
        rows = [
            self._separate_clips(rng) if rng.random() < 0.5 else self._stream(rng)
            for _ in range(self.batch)
        ]
        windows, frames, recordings, texts, spoken = zip(*rows, strict=True)
        characters = [[CHARACTERS.index(c) + 1 for c in text] for text in texts]
        words = [[self.vocabulary[word] for word in text.split()] for text in texts]
        return (
            np.stack(windows),
            np.stack(frames),
            np.stack(recordings),
            pad_labels(characters, 144 * self.windows),
            pad_labels(words, 32 * self.windows),
            np.stack(spoken),
        )

    def _separate_clips(
        self, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, np.ndarray]:
        """Windows, valid frames, recording ids, text and words: a clip in each window."""
        picked = rng.choice(self._short, self.windows)
        cut = [self.spec.cut(self.clips.samples[i]) for i in picked]
        windows, frames = (np.concatenate([part[j] for part in cut]) for j in range(2))
        length = self.spec.samples // FEATURE_SAMPLES
        spoken = pad_labels([self.clips.frames[i][:length] for i in picked], length)
        recordings = np.arange(self.windows, dtype=np.int32)
        text = " ".join(self.clips.texts[i] for i in picked)
        return windows, frames, recordings, text, spoken.ravel()

    def _stream(
        self, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, np.ndarray]:
        """The same for consecutive clips with gaps: one recording that crosses window borders."""
        clips, limit = self.clips, self.windows * self.spec.samples
        i = int(rng.integers(len(clips.samples)))
        offset = int(rng.integers(0, 2 * audio.SAMPLE_RATE)) if rng.random() < 0.7 else 0
        used = min(offset, limit - len(clips.samples[i]))
        pieces, texts = [np.zeros(used, np.int16)], []
        spoken = np.zeros(limit // FEATURE_SAMPLES, np.int32)
        while used + len(clips.samples[i]) <= limit:
            gap = int(rng.uniform(0.1, 0.7) * audio.SAMPLE_RATE)
            pieces += [clips.samples[i], np.zeros(gap, np.int16)]
            texts.append(clips.texts[i])
            first = used // FEATURE_SAMPLES
            words = clips.frames[i][: len(spoken) - first]
            spoken[first : first + len(words)] = words
            used += len(clips.samples[i]) + gap
            i = int(rng.integers(len(clips.samples)))
        stream = np.concatenate(pieces)[:limit]
        if self.spec.count(len(stream)) < self.windows:
            shortest = (self.windows - 1) * self.spec.samples + audio.SAMPLE_RATE
            stream = np.pad(stream, (0, shortest - len(stream)))
        windows, frames = self.spec.cut(stream)
        recordings = np.zeros(self.windows, np.int32)
        return windows, frames, recordings, " ".join(texts), spoken
