"""Spontaneous speech and acoustics, by strength."""

import random

import numpy as np
import pytest

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.synthesis import corpus, engines
from fastslm_jax.synthesis.augment import Channel
from fastslm_jax.synthesis.manner import Manner

TEXT = "call anna at five, please."


def say(seed: int = 0, **strengths: float) -> list[str]:
    return Manner(**strengths).say(TEXT, random.Random(seed)).split()


def test_nothing_changes_by_default():
    assert " ".join(say()) == TEXT
    signal = np.random.default_rng(0).normal(size=1000)
    np.testing.assert_array_equal(Manner().record(signal, random.Random(0)), signal)


def test_every_word_is_hesitant_or_repeated_at_strength_one():
    words = TEXT.split()
    hesitant = say(hesitations=1.0)
    assert hesitant[1::2] == words
    assert set(hesitant[::2]) <= {"um", "uh"}
    assert " ".join(say(repetitions=1.0)) == ("call call anna anna at at five five, please please.")


def test_a_restart_repeats_the_first_words():
    for seed in range(10):
        said = say(seed, restarts=1.0)
        broken_off = said[: len(said) - 5]
        assert 1 <= len(broken_off) <= 4
        assert said[len(broken_off) :] == TEXT.split()
        assert broken_off[-1].endswith(",")
        assert " ".join(broken_off).strip(",") == " ".join(TEXT.split()[: len(broken_off)]).strip(
            ","
        )


def test_a_greater_strength_adds_to_a_smaller_one():
    for seed in range(20):
        weak, strong = (say(seed, hesitations=p, repetitions=p) for p in (0.2, 0.6))
        rest = iter(strong)
        assert all(word in rest for word in weak)  # a subsequence
        assert len(say(seed, hesitations=0.6)) >= len(say(seed, hesitations=0.2))


def test_noise_has_its_distance_in_db():
    signal = np.random.default_rng(0).normal(size=SAMPLE_RATE)
    noise = Manner(snr_db=10.0).record(signal, random.Random(1)) - signal
    assert 10 * np.log10(np.mean(signal**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.3)


def test_reverberation_decays_in_its_time():
    impulse = np.zeros(SAMPLE_RATE)
    impulse[0] = 1.0
    response = Manner(reverb_seconds=0.5).record(impulse, random.Random(0))
    assert np.sum(response[1:] ** 2) == pytest.approx(10**-0.3, rel=1e-3)
    assert np.abs(response[SAMPLE_RATE // 2 :]).max() < 1e-9


@pytest.mark.parametrize(
    ("change", "length", "pitch"),
    [({}, 1.0, 1.0), ({"rate": 2.0}, 0.5, 1.0), ({"pitch": 12.0}, 1.0, 2.0)],
)
def test_rate_and_pitch_change_independently(monkeypatch, change, length, pitch):
    """An engine that says 1 s of pulses at 200 Hz at any text."""

    class Pulses(engines.Engine):
        name = "pulses"

        def speak(self, text, voice, speed=1.0):
            pulses = np.zeros(round(16_000 / speed), np.float32)
            pulses[::80] = 1.0
            return pulses, 16_000

    monkeypatch.setitem(engines.ENGINES, "pulses", Pulses())
    recipe = corpus.Recipe(
        ("hello",),
        ((engines.Voice("pulses", "a"),),),
        no_speech=0.0,
        channel=Channel(0.0, 0.0, 0.0, 0.0),
        manner=Manner(**change),
    )
    clip = corpus.plan(recipe, 0)
    samples = clip.render().astype(float)
    loud = np.flatnonzero(np.abs(samples) > 100)
    tone = samples[loud[0] : loud[-1] + 1]
    assert len(tone) / SAMPLE_RATE == pytest.approx(length / clip.speed, rel=0.02)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(tone, 2 * len(tone))) ** 2)
    period = correlation[30:100].argmax() + 30  # samples
    assert SAMPLE_RATE / period == pytest.approx(200 * pitch, rel=0.02)


def test_the_sentence_and_the_voice_do_not_depend_on_the_strength():
    voices = ((engines.Voice("a", "1"), engines.Voice("a", "2")),)
    texts = ("call anna", "press two", "good night")
    plain, noisy = (
        [corpus.plan(corpus.Recipe(texts, voices, manner=manner), i) for i in range(20)]
        for manner in (Manner(), Manner(snr_db=0.0, repetitions=1.0))
    )
    for one, other in zip(plain, noisy, strict=True):
        assert (one.text, one.voice, one.speed) == (other.text, other.voice, other.speed)
        assert one.row(100) == other.row(100)


def test_settings_of_older_corpora_still_match():
    recipe = corpus.Recipe(("a",), ())
    assert "manner" not in recipe.settings()
    changed = corpus.Recipe(("a",), (), manner=Manner(rate=1.5)).settings()
    assert changed["manner"]["rate"] == 1.5
