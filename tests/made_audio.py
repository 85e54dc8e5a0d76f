"""Files of many formats and with odd headers, as content; made by PyAV and soundfile."""

import functools
import io
import pathlib
import struct
import tempfile
from collections.abc import Callable

import av
import numpy as np
import soundfile
from signals import speech_like

SECONDS = 2.0  # of the sound in each file; joined files have it twice


def sound(rate: int = 16_000, channels: int = 1, seconds: float = SECONDS) -> np.ndarray:
    """Samples [n, channels] in [-1, 1]; the first channel is the loudest."""
    samples = np.interp(
        np.arange(round(seconds * rate)) * 16_000 / rate,
        np.arange(round(seconds * 16_000)),
        speech_like(seconds),
    )
    return np.stack([samples / (1 + channel) for channel in range(channels)], axis=1)


def by_soundfile(
    format: str, subtype: str, rate: int = 16_000, channels: int = 1, **options: object
) -> bytes:
    """Content written by libsndfile; see `soundfile.available_formats`."""
    file = io.BytesIO()
    soundfile.write(file, sound(rate, channels), rate, format=format, subtype=subtype, **options)
    return file.getvalue()


class _Pipe(io.BytesIO):
    """A file whose start cannot be mended at the end."""

    def seekable(self) -> bool:
        return False


def by_ffmpeg(
    format: str,
    codec: str,
    rate: int = 16_000,
    channels: int = 1,
    *,
    picture: str = "",
    is_pipe: bool = False,
    **options: str,
) -> bytes:
    """Content written by ffmpeg's libraries.

    Args:
        format: the muxer.
        codec: the encoder.
        rate: sample rate.
        channels: number of channels, 1 or 2.
        picture: encoder of a video that is longer than the sound.
        is_pipe: whether the muxer cannot go back to the header.
        options: options of the muxer.
    """
    pipe = _Pipe()
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(pipe if is_pipe else file.name, "w", format=format, options=options) as container,
    ):
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono" if channels == 1 else "stereo"
        if picture:
            video = container.add_stream(picture, rate=10)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            for number in range(40):
                frame = av.VideoFrame(64, 64, "yuv420p")
                frame.pts = number
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        samples = np.ascontiguousarray(sound(rate, channels).T.astype(np.float32))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
        frame.rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
        container.close()
        return pipe.getvalue() if is_pipe else pathlib.Path(file.name).read_bytes()


# ------------------------------------------------------------------------------------ headers

WAV = functools.partial(by_soundfile, "WAV")
MP3 = functools.partial(by_soundfile, "MP3", "MPEG_LAYER_III")


def wav_sizes(riff: int, data: int) -> bytes:
    """A wav file of 2 s whose header has other sizes."""
    content = WAV("PCM_16")
    return (
        content[:4]
        + struct.pack("<I", riff)
        + content[8:40]
        + struct.pack("<I", data)
        + (content[44:])
    )


def chunk(name: bytes, size: int) -> bytes:
    """A chunk of a wav file, with a pad byte if its size is odd."""
    return struct.pack("<4sI", name, size) + b"x" * size + bytes(size % 2)


def wav_with(before: bytes = b"", after: bytes = b"") -> bytes:
    """A wav file with other chunks before and after its samples."""
    content = WAV("PCM_16")
    content = content[:36] + before + content[36:] + after
    return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def flac_with_total(total: int) -> bytes:
    """A flac file whose header has another number of samples (0: unknown)."""
    content = by_soundfile("FLAC", "PCM_16")
    return patched(content, 22, struct.pack(">I", total))


def rf64_placeholder() -> bytes:
    content = by_soundfile("RF64", "PCM_16")
    return patched(content, 20, bytes(24))  # the sizes in the ds64 chunk


def mp3_frames(level: float) -> bytes:
    """The audio of an mp3 file, without the header that has its length."""
    content = MP3(bitrate_mode="CONSTANT", compression_level=level)
    rates = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]  # kbit/s of MPEG-2
    at, frames = 0, []
    while at + 4 < len(content):
        if content[at] != 0xFF or content[at + 1] & 0xE0 != 0xE0:
            at += 1
            continue
        size = 72 * rates[content[at + 2] >> 4] * 1000 // 16_000 + (content[at + 2] >> 1 & 1)
        frames.append(content[at : at + size])
        at += size
    return b"".join(f for f in frames if b"Xing" not in f[:60] and b"Info" not in f[:60])


def mp3_with_tag(*, frames: float = 1.0, size: float = 1.0) -> bytes:
    """An mp3 file whose header has a multiple of the true number of frames and bytes."""
    content = MP3()
    at = max(content.find(b"Xing"), content.find(b"Info"))
    old_frames, old_size = struct.unpack(">II", content[at + 8 : at + 16])
    return patched(
        content, at + 8, struct.pack(">II", round(old_frames * frames), round(old_size * size))
    )


def id3(size: int) -> bytes:
    return b"ID3\x03\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + b"x" * size


def ogg(subtype: str, **options: int) -> bytes:
    return by_soundfile("OGG", subtype, **options)


# --------------------------------------------------------------------------------------- table

OPUS, VORBIS = functools.partial(ogg, "OPUS"), functools.partial(ogg, "VORBIS")
PLACEHOLDERS = {  # size of the file, size of the samples
    "0": (0, 0),
    "36": (36, 0),
    "0x7FFFF000 (SoX)": (0x7FFFF024, 0x7FFFF000),
    "0x7FFFFFFF": (0x7FFFFFFF, 0x7FFFFFFF),
    "0x80000000": (0x80000024, 0x80000000),
    "2000000000": (2_000_000_036, 2_000_000_000),
    "0xFFFFFFFF (ffmpeg)": (0xFFFFFFFF, 0xFFFFFFFF),
    "0xFFFFF000": (0xFFFFF024, 0xFFFFF000),
}
# Name and suffix → content. All of it must be heard.
FORMATS: dict[str, Callable[[], bytes]] = {
    **{
        f"{subtype.lower()}.wav": functools.partial(WAV, subtype)
        for subtype in (
            *("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW"),
            *("IMA_ADPCM", "MS_ADPCM", "GSM610"),
        )
    },
    **{
        f"size {name}.wav": functools.partial(wav_sizes, *sizes)
        for name, sizes in PLACEHOLDERS.items()
    },
    "extensible.wav": lambda: by_soundfile("WAVEX", "PCM_24", 48_000, 2),
    "six channels.wav": lambda: by_soundfile("WAVEX", "PCM_16", 48_000, 6),
    "8 kHz.wav": lambda: WAV("PCM_16", 8_000),
    "44.1 kHz stereo.wav": lambda: WAV("PCM_16", 44_100, 2),
    "odd chunk before.wav": lambda: wav_with(before=chunk(b"LIST", 27)),
    "odd chunk after.wav": lambda: wav_with(after=chunk(b"LIST", 2001)),
    "id3 chunk after.wav": lambda: wav_with(after=chunk(b"id3 ", 5000)),
    "bare tag after.wav": lambda: wav_with(after=id3(5000)),
    "big endian.wav": lambda: by_soundfile("WAV", "PCM_16", endian="BIG"),
    "a.rf64": lambda: by_soundfile("RF64", "PCM_16"),
    "no size.rf64": rf64_placeholder,
    "a.w64": lambda: by_soundfile("W64", "PCM_16"),
    "float.w64": lambda: by_soundfile("W64", "FLOAT", 44_100, 2),
    "a.aiff": lambda: by_soundfile("AIFF", "PCM_16"),
    "float.aiff": lambda: by_soundfile("AIFF", "FLOAT", 22_050, 2),
    "a.au": lambda: by_soundfile("AU", "PCM_16"),
    "no size.au": lambda: patched(by_soundfile("AU", "ULAW", 8_000), 8, b"\xff" * 4),
    "a.caf": lambda: by_soundfile("CAF", "PCM_24", 48_000),
    "no size.caf": lambda: by_ffmpeg("caf", "pcm_s16le", is_pipe=True),
    "a.sph": lambda: by_soundfile("NIST", "PCM_16"),
    "a.flac": lambda: by_soundfile("FLAC", "PCM_16"),
    "24 bit.flac": lambda: by_soundfile("FLAC", "PCM_24", 96_000, 2),
    "no length.flac": lambda: flac_with_total(0),
    "length too small.flac": lambda: flac_with_total(8_000),
    "tag before.flac": lambda: id3(500) + by_soundfile("FLAC", "PCM_16"),
    "vorbis.ogg": lambda: VORBIS(rate=44_100, channels=2),
    "vorbis twice.ogg": lambda: 2 * VORBIS(),
    "flac.ogg": lambda: by_ffmpeg("ogg", "flac"),
    "opus.opus": lambda: OPUS(rate=48_000, channels=2),
    "opus twice.opus": lambda: 2 * OPUS(),
    "a.mp3": MP3,
    "44.1 kHz stereo.mp3": lambda: MP3(rate=44_100, channels=2),
    "variable.mp3": lambda: MP3(bitrate_mode="VARIABLE"),
    "no length.mp3": lambda: mp3_frames(0.0),
    "rising rate.mp3": lambda: mp3_frames(0.9) + mp3_frames(0.0),
    "falling rate.mp3": lambda: mp3_frames(0.0) + mp3_frames(0.9),
    "length too small.mp3": lambda: mp3_with_tag(frames=0.3, size=0.3),
    "length too large.mp3": lambda: mp3_with_tag(frames=3.0),
    "twice.mp3": lambda: 2 * MP3(),
    "twice with tags.mp3": lambda: 2 * (id3(300) + MP3() + b"TAG" + bytes(125)),
    "two rates.mp3": lambda: MP3() + MP3(rate=44_100),
    "tag of 3 MB.mp3": lambda: id3(3_000_000 - 1) + MP3(),
    "a.mp2": lambda: by_ffmpeg("mp2", "mp2"),
    "a.m4a": lambda: by_ffmpeg("ipod", "aac", 44_100, 2),
    "header first.m4a": lambda: by_ffmpeg("ipod", "aac", movflags="faststart"),
    "fragments.mp4": lambda: by_ffmpeg("mp4", "aac", movflags="frag_keyframe+empty_moov"),
    "alac.m4a": lambda: by_ffmpeg("ipod", "alac", 44_100),
    "longer video.mp4": lambda: by_ffmpeg("mp4", "aac", 48_000, 2, picture="mpeg4"),
    "pcm.mov": lambda: by_ffmpeg("mov", "pcm_s16le"),
    "a.aac": lambda: by_ffmpeg("adts", "aac"),
    "twice.aac": lambda: 2 * by_ffmpeg("adts", "aac"),
    "a.webm": lambda: by_ffmpeg("webm", "libopus", 48_000),
    "live.webm": lambda: by_ffmpeg("webm", "libopus", 48_000, is_pipe=True),
    "longer video.mkv": lambda: by_ffmpeg("matroska", "aac", 48_000, picture="mpeg4"),
    "flac.mka": lambda: by_ffmpeg("matroska", "flac"),
    "a.amr": lambda: by_ffmpeg("amr", "libopencore_amrnb", 8_000),
    "a.3gp": lambda: by_ffmpeg("3gp", "libopencore_amrnb", 8_000),
}
TWICE = {name for name in FORMATS if "twice" in name or "rising" in name or "falling" in name}
TWICE |= {"two rates.mp3"}


def seconds(name: str) -> float:
    """Seconds of sound in a file of FORMATS; compressed audio may have some padding."""
    return SECONDS * (2 if name in TWICE else 1)
