"""Decoding of audio files of any format with ffmpeg's libraries (PyAV).

The length of a file is what decoding yields; what its header promises is only compared with it.
"""

from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np

from fastslm_jax import audio_headers
from fastslm_jax.audio_headers import AudioError

# ffmpeg's demuxers. Those of playlists, which open other files, must not be among them.
FORMATS = "aac,aiff,amr,au,caf,flac,matroska,mov,mp3,nistsphere,ogg,w64,wav"
SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".m4a", ".m4b", ".mp4"),
    *(".mov", ".aac", ".webm", ".mka", ".mkv", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf"),
    *(".w64", ".rf64", ".3gp", ".amr", ".sph"),
)
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz
TOLERANCE = 0.1  # seconds by which decoded audio may be shorter than the header says
BLOCK = 1 << 22  # values (samples times channels) that are converted at a time
_PROMISING = ("flac", "mov", "nistsphere", "ogg")  # formats whose duration is not a guess
_OPTIONS = {
    "format_whitelist": FORMATS,
    "max_probe_packets": "1",  # do not search for other codecs inside PCM, which is slow
    "max_size": "16384",  # bytes in a packet of PCM
}
_ADVICE = "convert it to wav or flac"


def _unreadable(error: Exception) -> AudioError:
    if isinstance(error, av.PatchWelcomeError):
        reason = "streams of different kinds are joined in one file"
    elif isinstance(error, av.ArgumentError):
        reason = "its format is not supported"
    else:
        reason = getattr(error, "strerror", None) or error
    return AudioError(f"not readable as audio ({reason}); {_ADVICE}")


def _packets(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise _unreadable(error) from None


def _decoded(packet: av.Packet) -> list[av.AudioFrame]:
    try:
        return packet.decode()
    except av.FFmpegError as error:
        if bytes(packet).startswith(audio_headers.TAGS):  # between mp3 files that were joined
            return []
        at = "" if packet.pts is None else f" after {float(packet.pts * packet.time_base):.2f} s"
        raise AudioError(
            f"damaged or truncated{at} ({error.strerror}); copy it again, or {_ADVICE}", "truncated"
        ) from None


def _is_promise(file: BinaryIO, container: av.container.InputContainer, first: int) -> bool:
    """Whether the duration that ffmpeg tells is a promise of the header.

    Args:
        first: position of the first packet in the file.
    """
    name = container.format.name.partition(",")[0]
    return name in _PROMISING or (name == "mp3" and audio_headers.is_mp3_cut(file, first))


def _float(arrays: list[np.ndarray]) -> np.ndarray:
    """Joins samples of any type [channels, n] as float32; full scale is 1."""
    samples = np.concatenate(arrays, axis=1)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return samples.astype(np.float32, copy=False)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """The samples of a frame [channels, n]."""
    array = frame.to_ndarray()
    return array if frame.format.is_planar else array.reshape(frame.samples, -1).T


def _stream(container: av.container.InputContainer) -> av.AudioStream:
    stream = container.streams.best("audio")
    if stream is None or stream.codec_context is None or not stream.rate:
        raise AudioError("not readable as audio: the file contains none that can be decoded")
    if not LOWEST_RATE <= stream.rate <= HIGHEST_RATE:
        raise AudioError(f"not readable as audio: its sample rate is {stream.rate} Hz")
    if (container.format.name, stream.codec_context.name) == ("caf", "alac"):
        # The last packet is already short; ffmpeg would cut it once more.
        stream.codec_context.flags2 |= av.codec.context.Flags2.skip_manual
    return stream


def _seek(container: av.container.InputContainer, stream: av.AudioStream, offset: float) -> bool:
    """Seeks to a frame before `offset` seconds if this is exact; else stays at the start."""
    codec = stream.codec_context.name
    is_exact = codec == "flac" or codec.startswith("pcm_")
    if not is_exact or stream.time_base * stream.rate != 1:
        return False
    try:
        container.seek(round(offset * stream.rate), stream=stream)
    except av.FFmpegError:  # after the end
        return False
    return True


def _frames(
    file: BinaryIO, container: av.container.InputContainer, offset: float, can_seek: bool
) -> Iterator[tuple[float, int, av.AudioFrame]]:
    """Decodes to the end, and compares the length with the header's.

    Args:
        file: the file.
        container: the same file, open.
        offset: seconds that may be skipped.
        can_seek: whether to skip them where this is exact; an offset after the end is no error.

    Yields:
        Frames and their position: seconds before the current sample rate, and samples since then.
    """
    stream = _stream(container)
    is_sought = can_seek and _seek(container, stream, offset)
    base, at, rate, is_promise = 0.0, 0, 0, False
    for number, packet in enumerate(_packets(container, stream)):
        if number == 0:
            is_promise = _is_promise(file, container, packet.pos or 0)
        for frame in _decoded(packet):
            if frame.sample_rate != rate:  # also in the middle of a file, if several were joined
                base, at = base + at / rate if rate else 0.0, 0
                at = frame.pts if is_sought and not rate else 0
                rate = frame.sample_rate
            yield base, at, frame
            at += frame.samples
    seconds = base + at / rate if rate else 0.0
    if is_promise and stream.duration:
        promised = float(stream.duration * stream.time_base)
        if rate and seconds < promised - TOLERANCE:
            raise AudioError(
                f"truncated (the header says {promised:.2f} s, the file ends at {seconds:.2f} s); "
                f"copy it again, or {_ADVICE}",
                "truncated",
            )
    if not seconds and not is_sought:
        raise AudioError("contains no samples", "zero_length")
    if offset >= seconds and offset and not is_sought:
        raise AudioError(
            f"offset {offset} s is after the end of the file ({seconds:.2f} s)", "duration_mismatch"
        )


def _parts(
    frames: Iterator[tuple[float, int, av.AudioFrame]], offset: float, duration: float | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields rates and samples [channels, n] of a part, up to its end."""
    for base, at, frame in frames:
        rate, stop = frame.sample_rate, None
        start = round((offset - base) * rate) - at
        if duration is not None:
            stop = max(0, start + round(duration * rate))
        yield rate, _samples(frame)[:, max(0, start) : stop]
        if stop is not None and stop <= frame.samples:
            return


def _blocks(parts: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Joins parts of one kind up to BLOCK values, and converts them to float32."""
    pending, size, kind = [], 0, (0,)
    for rate, samples in parts:
        if pending and (kind != (rate, len(samples), samples.dtype) or size >= BLOCK):
            yield kind[0], _float(pending)
            pending, size = [], 0
        if samples.size:
            kind = rate, len(samples), samples.dtype
            pending.append(samples)
            size += samples.size
    if pending:
        yield kind[0], _float(pending)


def read_blocks(
    file: BinaryIO, offset: float = 0.0, duration: float | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes a part of a file.

    Clips of PCM and FLAC are found by seeking. Other files are decoded from the start, because only
    this is exact.

    Args:
        file: a file that can be sought in.
        offset: start in seconds.
        duration: length in seconds (None: to the end of the file).

    Yields:
        The sample rate, and float32 samples [channels, n] whose full scale is 1.

    Raises:
        AudioError: the file cannot be decoded, is empty or truncated, or ends before `offset`.
    """
    is_placeholder = audio_headers.check(file)
    options = _OPTIONS | ({"ignore_length": "1"} if is_placeholder else {})
    for can_seek in (True, False) if offset else (False,):
        file.seek(0)
        try:
            container = av.open(file, options=options, metadata_errors="ignore")
        except (av.FFmpegError, ValueError) as error:
            raise _unreadable(error) from None
        with container:
            frames, is_empty = _frames(file, container, offset, can_seek), True
            for block in _blocks(_parts(frames, offset, duration)):
                is_empty = False
                yield block
        if not is_empty:  # else the offset is after the end
            return
