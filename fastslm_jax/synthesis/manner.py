"""How sentences are spoken and recorded: spontaneous speech, voice, and acoustics, by strength.

Unlike the probabilities of `augment.Channel`, a strength applies to every clip. Transcripts stay
fluent: they have no hesitation, and what is said twice once.
"""

import dataclasses
import random

import numpy as np

from fastslm_jax.synthesis import augment

HESITATIONS = ("um", "uh")
MAX_BROKEN_OFF = 4  # words before a restart
REVERB_DIRECT_DB = 3.0  # energy of the reverberation, in dB below the direct sound


@dataclasses.dataclass(frozen=True)
class Manner:
    """Strengths; the defaults change nothing.

    Attributes:
        hesitations: probability of "um" or "uh" before a word.
        repetitions: probability that a word is said twice.
        restarts: probability that a sentence is broken off after up to four words, and begun again.
        rate: factor of the speaking rate.
        pitch: semitones by which the voice is higher.
        snr_db: level of the speech above that of noise, white or pink, in dB; None: no noise.
        reverb_seconds: time in which reverberation decays by 60 dB.
    """

    hesitations: float = 0.0
    repetitions: float = 0.0
    restarts: float = 0.0
    rate: float = 1.0
    pitch: float = 0.0
    snr_db: float | None = None
    reverb_seconds: float = 0.0

    @property
    def pitch_factor(self) -> float:
        return 2.0 ** (self.pitch / 12)

    def say(self, text: str, rng: random.Random) -> str:
        """The words to speak for a sentence.

        "call anna at five" → "call anna, call um anna at at five". With one generator, a greater
        strength adds to what a smaller one inserts.
        """
        words, said = text.split(), []
        broken_off = words[: rng.randint(1, MAX_BROKEN_OFF)]
        if rng.random() < self.restarts:
            said += [*broken_off[:-1], broken_off[-1].rstrip(".,?!") + ","]
        for word in words:
            hesitation, is_hesitant = rng.choice(HESITATIONS), rng.random() < self.hesitations
            is_repeated = rng.random() < self.repetitions
            said += [hesitation] * is_hesitant + [word.rstrip(".,?!")] * is_repeated + [word]
        return " ".join(said)

    def record(self, signal: np.ndarray, rng: random.Random) -> np.ndarray:
        """A signal [n] with reverberation and noise: [n]."""
        noise, is_pink = np.random.default_rng(rng.getrandbits(64)), rng.random() < 0.5
        if self.reverb_seconds:
            signal = augment.reverberate(signal, self.reverb_seconds, REVERB_DIRECT_DB, noise)
        if self.snr_db is not None:
            level = np.sqrt(np.mean(signal**2)) * 10.0 ** (-self.snr_db / 20)
            signal = signal + level * augment.white_or_pink_noise(len(signal), is_pink, noise)
        return signal
