"""Labelled clips for the probes: speech with controlled prosody, and sounds without speech.

A clip fills one window of the encoder exactly, so that its length tells nothing. It is a function
of (seed, target, set, class, number). The training and test clips of a target share no sentence
and, except for the target "speaker", no speaker.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator

import numpy as np

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.demo import voices
from fastslm_jax.demo.examples import draw_example
from fastslm_jax.synthesis import espeak, no_speech

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Prosody:
    """Ranges that a clip's prosody is drawn from; see `espeak.synthesize_words` for the units.

    The default is the demo's corpus.
    """

    rate: Range = (150, 195)
    pitch: Range = (30, 70)
    pitch_range: Range = (45, 55)

    def draw(self, name: str, rng: random.Random) -> voices.Voice:
        """A voice with this prosody. `name`: an espeak-ng voice."""
        ranges = (self.rate, self.pitch, self.pitch_range)
        return voices.Voice(name, *(rng.randint(*limits) for limits in ranges))


NORMAL = Prosody()
# {target: {class: its prosody; None: a sound without speech}}. The styles change what emotions
# change in speech (rate, pitch and its range); "flat" differs from "neutral" in intonation only.
TARGETS: dict[str, dict[str, Prosody | None]] = {
    "speaker": dict.fromkeys((f"en-us+{variant}" for variant in espeak.VARIANTS), NORMAL),
    "pitch": {
        "low": Prosody(pitch=(15, 30)),
        "middle": Prosody(pitch=(42, 58)),
        "high": Prosody(pitch=(70, 85)),
    },
    "rate": {
        "slow": Prosody(rate=(115, 135)),
        "normal": Prosody(rate=(160, 180)),
        "fast": Prosody(rate=(210, 240)),
    },
    "style": {
        "neutral": NORMAL,
        "excited": Prosody(rate=(200, 230), pitch=(60, 85), pitch_range=(80, 99)),
        "sad": Prosody(rate=(110, 140), pitch=(15, 40), pitch_range=(5, 20)),
        "flat": Prosody(pitch_range=(0, 5)),
    },
    "sound": {"speech": NORMAL, "beeps": None, "tone": None, "noise": None, "music": None},
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A window of audio with its class.

    Attributes:
        samples: int16 [n] at 16 kHz.
        label: number of the class in its target.
        group: clips of a group are not independent: they have the same speaker (for the target
            "speaker": the same sentences).
    """

    samples: np.ndarray
    label: int
    group: str


def draw(target: str, split: str, count: int, length: int, seed: int) -> Iterator[Clip]:
    """Clips of a target, `count` of each class.

    Args:
        target: a key of TARGETS.
        split: "train" or "test".
        length: samples of a clip.
    """
    speakers = sorted({voice.name for voice in voices.voices()[split == "test"]})
    for number, (label, name) in itertools.product(range(count), enumerate(TARGETS[target])):
        rng = random.Random(f"probes/{seed}/{target}/{split}/{name}/{number}")
        prosody = TARGETS[target][name]
        if prosody is None:
            samples, group = _sound(name, length, rng), f"{name}-{number}"
        elif target == "speaker":  # all speakers say the same
            words = random.Random(f"probes/{seed}/{target}/{split}/{number}")
            samples, group = _speech(prosody.draw(name, rng), split, length, words), str(number)
        else:
            group = speakers[number % len(speakers)]
            samples = _speech(prosody.draw(group, rng), split, length, rng)
        scaled = 32767 * 10.0 ** (rng.uniform(-12, -1) / 20) * samples / np.abs(samples).max()
        yield Clip(np.round(scaled).astype(np.int16), label, group)


def _speech(voice: voices.Voice, split: str, length: int, rng: random.Random) -> np.ndarray:
    """Sentences until the clip is full; the last one is cut."""
    parts, missing = [], length
    while missing > 0:
        speech, _ = voices.speak(draw_example("asr", rng, split).text, voice)
        parts += [speech, np.zeros(round(rng.uniform(0.2, 0.4) * SAMPLE_RATE))]
        missing -= len(parts[-2]) + len(parts[-1])
    return np.concatenate(parts)[:length]


def _sound(name: str, length: int, rng: random.Random) -> np.ndarray:
    noise = np.random.default_rng(rng.getrandbits(64))
    if name in no_speech.KINDS:
        return no_speech.KINDS[name](length, rng, noise)
    frequency = rng.uniform(300, 2500)
    if name == "tone":
        signal = no_speech.tone([frequency], length / SAMPLE_RATE)
    else:
        beep = no_speech.tone([frequency], rng.uniform(0.08, 0.8))
        pause = np.zeros(round(rng.uniform(0.1, 1.0) * SAMPLE_RATE))
        signal = np.resize(np.concatenate([beep, pause]), length)
    return signal[:length] + no_speech.KINDS["silence"](length, rng, noise)
