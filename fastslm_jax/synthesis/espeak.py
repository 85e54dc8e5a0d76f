"""A minimal ctypes binding of espeak-ng, a formant synthesizer.

The `espeakng_loader` wheel provides the library. espeak-ng keeps its state in globals: use one
synthesizer per process, and never two threads. Some state (the flutter phase, for example) carries
over between utterances and no call resets it, not even `espeak_Terminate`. `synthesize_words`
therefore reloads the library, which takes a fraction of a millisecond, so that its samples depend
on its arguments only.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from fastslm_jax.errors import UserError

ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_BUFFER_MILLISECONDS = 500
_RATE, _VOLUME, _PITCH, _PITCH_RANGE = 1, 2, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class _Event(ctypes.Structure):
    _fields_: ClassVar = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_LAST_EVENT, _WORD_EVENT = 0, 1
_chunks: list[bytes] = []
_words: list[tuple[int, int]] = []


@_CALLBACK
def _collect(samples: int | None, count: int, events: int) -> int:
    """Callback of espeak-ng: collects samples, and the text positions of words."""
    if samples and count > 0:
        _chunks.append(ctypes.string_at(samples, 2 * count))
    events, i = ctypes.cast(events, ctypes.POINTER(_Event)), 0
    while events[i].type != _LAST_EVENT:
        if events[i].type == _WORD_EVENT:
            _words.append((events[i].text_position - 1, events[i].sample))
        i += 1
    return 0


def _library_paths() -> tuple[str, str]:
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "the synthetic corpus needs espeak-ng; run pip install -r requirements-demo.txt"
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def check() -> None:
    """Raises UserError if espeak-ng is not installed."""
    _library_paths()


@contextlib.contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """Yields (library, sample rate). Unloads the library at the end, which resets its globals."""
    path, data_path = _library_paths()
    library, libc = ctypes.CDLL(path), ctypes.CDLL(None)
    libc.dlclose.argtypes = [ctypes.c_void_p]
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    try:
        rate = library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MILLISECONDS, data_path.encode(), 0
        )
        if rate <= 0:
            raise UserError(f"espeak-ng did not start from {data_path}")
        # The library seeds itself with the time; breathy voices draw noise from it.
        library.espeak_ng_SetRandSeed(1)
        library.espeak_SetSynthCallback(_collect)
        yield library, rate
        library.espeak_Terminate()
    finally:
        libc.dlclose(library._handle)


def synthesize_words(
    text: str,
    voice: str = "en-us",
    rate: int = 175,
    pitch: int = 50,
    volume: int = 100,
    pitch_range: int = 50,
) -> tuple[np.ndarray, int, list[tuple[int, int]]]:
    """Synthesizes speech.

    Args:
        text: words in the voice's language.
        voice: an espeak-ng voice with an optional variant: "en-us", "en-gb-scotland+f3".
        rate: words per minute, 80 to 450.
        pitch: 0 to 99.
        volume: 0 to 200; 100 is normal.
        pitch_range: strength of the intonation, 0 (monotone) to 100; 50 is normal.

    Returns:
        int16 samples [n], their sample rate, and (character, sample) where each word starts.
        Words that espeak-ng speaks as one ("in the") have one start.
    """
    with _fresh_library() as (library, sample_rate):
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in (
            (_RATE, rate),
            (_PITCH, pitch),
            (_VOLUME, volume),
            (_PITCH_RANGE, pitch_range),
        ):
            if library.espeak_SetParameter(parameter, value, 0) != 0:
                raise UserError(f"espeak-ng rejected parameter {parameter} = {value}")
        _chunks.clear()
        _words.clear()
        data = text.encode()
        if library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _CHARS_UTF8, None, None) != 0:
            raise UserError(f"espeak-ng could not speak {text!r}")
        library.espeak_Synchronize()
        if not _chunks:
            raise UserError(f"espeak-ng produced no audio for {text!r}")
        samples = np.frombuffer(b"".join(_chunks), np.int16)
        _chunks.clear()
        return samples, sample_rate, _words.copy()
