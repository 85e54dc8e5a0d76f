"""Recordings of the synthetic corpus: which words and voice each has, and its audio.

A recording is a pure function of (seed, set, task, index), whichever process renders it.
"""

import dataclasses
import itertools
import random

import numpy as np

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.demo import voices
from fastslm_jax.demo.examples import SpokenExample, draw_example
from fastslm_jax.synthesis.augment import CLEAN, Augmentation, augment, insert_hesitations

# Maximum seconds. One window of the demo's encoder is 6 s; summaries may take two.
MAX_SECONDS = {"asr": 5.6, "ast": 5.6, "ssum": 11.5, "sqqa": 5.9}

Segment = dict[str, object]  # start and end in seconds, text


@dataclasses.dataclass(frozen=True)
class SyntheticRecording:
    """One audio file. `target_seconds` is set for long recordings only."""

    seed: int
    set_name: str
    task: str
    index: int
    augmentation: Augmentation = CLEAN
    target_seconds: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.set_name}-{self.task}-{self.index:06d}"

    @property
    def split(self) -> str:
        """train, dev or test: "test_long" and "test_unseen_voices" have sentences of test."""
        return self.set_name.split("_")[0]

    @property
    def path(self) -> str:
        """Relative to the folder of the corpus."""
        return f"{self.split}/{self.key}.flac"

    def rng(self) -> random.Random:
        """Draws the words."""
        return random.Random(f"{self.seed}/{self.key}")

    def audio_rng(self) -> random.Random:
        """Draws silences, hesitations, level, reverberation and noise."""
        return random.Random(f"audio/{self.seed}/{self.key}")

    def example(self) -> SpokenExample:
        """What a short recording says."""
        return draw_example(self.task, self.rng(), self.split)

    def voice(self) -> voices.Voice:
        train, held_out = voices.voices()
        if self.set_name == "test_long":  # no voice twice
            return train[(37 * self.index + 11) % len(train)]
        choices = held_out if self.set_name == "test_unseen_voices" else train
        return random.Random(f"voice/{self.seed}/{self.key}").choice(choices)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE))


def _to_int16(signal: np.ndarray, peak_db: float) -> np.ndarray:
    gain = 32767 * 10.0 ** (peak_db / 20) / np.abs(signal).max()
    return np.round(signal * gain).astype(np.int16)


def _speak_short(
    recording: SyntheticRecording, rng: random.Random
) -> tuple[np.ndarray, str, voices.WordStarts, float]:
    """A short recording before reverberation and noise.

    Returns:
        samples, the text with hesitations, the starts of its words, and the peak in dBFS.
    """
    before, after = rng.uniform(0.05, 0.1), rng.uniform(0.05, 0.1)
    peak_db = rng.uniform(-20.0, -3.0)
    text = insert_hesitations(recording.example().text, rng, recording.augmentation)
    limit = MAX_SECONDS[recording.task] - before - after
    speech, starts = voices.speak_within(text, recording.voice(), limit)
    signal = np.concatenate([_silence(before), speech, _silence(after)])
    starts = [(character, max(0.0, before + second)) for character, second in starts]
    return signal, text, starts, peak_db


def render(recording: SyntheticRecording) -> np.ndarray:
    """The int16 samples of a short recording."""
    rng = recording.audio_rng()
    signal, _, _, peak_db = _speak_short(recording, rng)
    return _to_int16(augment(signal, rng, recording.augmentation), peak_db)


def word_times(recording: SyntheticRecording) -> list[tuple[str, float, float]]:
    """(word, start, end) in seconds of a short recording, including hesitations.

    Words that espeak-ng speaks as one ("in the") share their time by number of letters.
    """
    signal, text, starts, _ = _speak_short(recording, recording.audio_rng())
    first = starts[0][1] if starts else 0.0
    starts = [(0, first), *starts[1:], (len(text), len(signal) / SAMPLE_RATE)]
    times = []
    for (character, start), (next_character, end) in itertools.pairwise(starts):
        words = text[character:next_character].replace(",", " ").split()
        letters = sum(map(len, words))
        for word in words:
            times.append((word, start, start + (end - start) * len(word) / letters))
            start, letters = times[-1][2], letters - len(word)
    return times


def render_long(recording: SyntheticRecording) -> tuple[np.ndarray, list[Segment]]:
    """Sentences of one voice, 0.2 to 0.6 s apart, up to the target length.

    Returns:
        int16 samples, and a segment for each sentence.
    """
    rng, voice = recording.rng(), recording.voice()
    parts, segments = [_silence(rng.uniform(0.05, 0.1))], []
    seconds = len(parts[0]) / SAMPLE_RATE
    while True:
        text = draw_example("asr", rng, recording.split).text
        speech, _ = voices.speak_within(text, voice, MAX_SECONDS["asr"])
        gap = _silence(rng.uniform(0.2, 0.6))
        spoken, pause = len(speech) / SAMPLE_RATE, len(gap) / SAMPLE_RATE
        if seconds + spoken + pause > recording.target_seconds:
            break
        segments.append(
            {"start": round(seconds, 3), "end": round(seconds + spoken, 3), "text": text}
        )
        parts += [speech, gap]
        seconds += spoken + pause
    signal = augment(np.concatenate(parts), rng, recording.augmentation)
    return _to_int16(signal, rng.uniform(-20.0, -3.0)), segments
