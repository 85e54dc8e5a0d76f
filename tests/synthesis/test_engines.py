"""Engines: every installed one speaks any text; missing ones say how to install them."""

import numpy as np
import pytest

from fastslm_jax.synthesis import engines
from fastslm_jax.synthesis.engines import EngineError, Voice


def installed(name: str) -> str:
    """Skips the test if an engine is not installed."""
    try:
        engines.parse(name)[0].speak("hello")
    except EngineError as error:
        pytest.skip(str(error))
    return name


@pytest.mark.parametrize("name", engines.ENGINES)
def test_an_engine_speaks_any_text_and_depends_on_its_arguments_only(name, tmp_path, monkeypatch):
    voice = engines.parse(installed(name))[0]
    monkeypatch.chdir(tmp_path)
    text = '-o x $(touch y) `touch y`; "tea" & <speed level="20"> café'
    samples, rate = voice.speak(text)
    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    assert rate in (8000, 16_000, 22_050, 24_000, 32_000, 48_000)
    assert 0.02 < np.abs(samples).max() <= 1
    assert 1 < len(samples) / rate < 15
    voice.speak("something else")
    np.testing.assert_array_equal(voice.speak(text)[0], samples)
    assert list(tmp_path.iterdir()) == []  # no file was written, no command was run


@pytest.mark.parametrize("name", engines.ENGINES)
def test_a_faster_voice_is_shorter(name):
    voice = engines.parse(installed(name))[0]
    text = "the old farmer carried a heavy basket of apples"
    lengths = [len(voice.speak(text, speed)[0]) for speed in (0.8, 1.0, 1.25)]
    assert lengths[0] > 1.1 * lengths[1] > 1.2 * lengths[2]


def test_voices_are_named_by_engine_and_voice():
    pytest.importorskip("espeakng_loader")
    assert engines.parse("espeak:en-us+f3") == (Voice("espeak", "en-us+f3"),)
    assert len(engines.parse("espeak")) == 60
    assert Voice("espeak", "en-us+f3").speaker == "espeak-en-us+f3"
    assert Voice("piper", "/voices/en_GB-alba.onnx").speaker == "piper-en_GB-alba"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kokoro", "engine 'kokoro' is not one of espeak, flite, festival, pico, piper, hibari"),
        ("espeak:xx", r"espeak has no voice 'xx'; it has en-us\+m1, "),
        ("flite:slt", "flite: is not installed; apt-get install flite"),
        ("festival", "festival: is not installed; apt-get install festival festvox-kallpc16k"),
    ],
)
def test_missing_engines_and_voices(spec, message, monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match=message):
        engines.parse(spec)


class Broken(engines.Engine):
    """Fails for the text "fail", and returns silence for others."""

    name = "broken"

    def speak(self, text: str, voice: str, speed: float = 1.0) -> engines.Speech:
        if text == "fail":
            raise RuntimeError("out of phonemes")
        return np.zeros(100, np.float32), 16_000


def test_any_failure_of_an_engine_is_one_error(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "broken", Broken())
    with pytest.raises(EngineError, match=r"broken-a: cannot speak 'fail' \(RuntimeError: out of"):
        Voice("broken", "a").speak("fail")
    with pytest.raises(EngineError, match="broken-a: returned no sound for 'hello'"):
        Voice("broken", "a").speak("hello")


def test_a_text_without_latin_letters_is_an_error_where_the_program_knows_no_others():
    with pytest.raises(EngineError, match="flite: cannot speak 'привет', which has no Latin"):
        Voice("flite", "slt").speak("привет")
