"""What the headers of audio files promise: the size of the samples, compared with the file's.

A file that ends before is truncated. A size of zero, or of at least PLACEHOLDER bytes that the file
does not have, was written by a program that did not know the size yet, and promises nothing.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from fastslm_jax.errors import UserError

PLACEHOLDER = 1_000_000_000  # bytes
_SLACK = 1024  # bytes of unknown content that may follow the samples
TAGS = (b"ID3", b"TAG", b"APETAGEX")
_SAMPLES = (b"data", b"SSND")  # names of the chunks of samples
# Containers of chunks: magic → (start of the first chunk, layout of a chunk's name and size,
# whether the size includes both, alignment of chunks).
_CHUNKS = {
    b"RIFF": (12, "<4sI", False, 2),
    b"RF64": (12, "<4sI", False, 2),
    b"BW64": (12, "<4sI", False, 2),
    b"RIFX": (12, ">4sI", False, 2),
    b"FORM": (12, ">4sI", False, 2),
    b"riff": (40, "<4s12xQ", True, 8),  # w64
    b"caff": (8, ">4sQ", False, 1),
}


class AudioError(UserError):
    """Audio cannot be used. The message gives the file (if it has a name), the reason and the fix.

    Attributes:
        kind: the reason as one of `ingest.decoding.KINDS`.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


def _truncated(declared: int, size: int) -> AudioError:
    return AudioError(
        f"truncated (the header says {declared} bytes, the file has {size}); copy it again, or "
        "convert the rest to flac",
        "truncated",
    )


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _chunks(
    file: BinaryIO, size: int, start: int, layout: tuple[int, str, bool, int]
) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name of each chunk, the start of its content, and the content's declared size."""
    _, names, is_inclusive, alignment = layout
    head = struct.calcsize(names)
    while start + head <= size:
        name, length = struct.unpack(names, _read(file, start, head))
        length = max(0, length - head) if is_inclusive else length
        yield name, start + head, length
        start += head + length
        start += -start % alignment


def _only_chunks_follow(
    file: BinaryIO, size: int, start: int, layout: tuple[int, str, bool, int]
) -> bool:
    """Whether the rest of a file has no samples: other chunks, tags, or too short to matter."""
    for name, content, length in _chunks(file, size, start, layout):
        is_name = all(32 <= byte < 127 for byte in name)
        is_more = name in _CHUNKS or name in _SAMPLES  # another file, or samples that are not read
        if not is_name or is_more or content + length > size + 1:
            break
        start = content + length
        start += -start % layout[-1]
    rest = _read(file, start, 1 << 20)
    return len(rest) <= _SLACK or rest.startswith(TAGS) or not any(rest)


def _check_chunks(file: BinaryIO, size: int, layout: tuple[int, str, bool, int]) -> bool:
    """Compares the declared size of the samples with the file.

    Returns:
        Whether the declared size is a placeholder.
    """
    long_size = None  # of RF64, whose data chunk has no room for it
    for name, start, length in _chunks(file, size, layout[0], layout):
        if name == b"ds64":
            (long_size,) = struct.unpack("<8xQ", _read(file, start, 16).ljust(16, b"\0"))
        if name not in _SAMPLES:
            continue
        declared = length if long_size is None else long_size
        end = start + declared
        if declared == 0 and start < size:
            return not _only_chunks_follow(file, size, start, layout)
        if end > size:
            if declared < PLACEHOLDER:
                raise _truncated(end, size)
            return True
        aligned = end + -end % layout[-1]
        if not any(_only_chunks_follow(file, size, at, layout) for at in {aligned, end}):
            raise AudioError(
                f"the header says that the samples end at byte {end}, but {size - end} bytes that "
                "are no other chunks follow; if they are samples, mend the header, for example "
                "with: sox --ignore-length IN.wav OUT.wav",
                "truncated",
            )
        return False
    return False


def _check_boxes(file: BinaryIO, size: int) -> None:
    """Checks that the boxes of an mp4 file are complete."""
    start = 0
    while start + 8 <= size:
        length, name, long = struct.unpack(">I4sQ", _read(file, start, 16).ljust(16, b"\0"))
        length = long if length == 1 else length
        if length < 8:  # 0: to the end of the file
            return
        start += length
        if start > size and name in (b"mdat", b"moov", b"moof"):
            raise _truncated(start, size)


def _check_segment(file: BinaryIO, size: int) -> None:
    """Checks that the segment of a Matroska or WebM file is complete."""
    head, at, end = _read(file, 0, 4096), 0, 0
    for _ in ("header", "segment"):
        width = 9 - head[at + 4].bit_length() if len(head) > at + 12 else 9
        if width > 8:
            return
        length = int.from_bytes(head[at + 4 : at + 4 + width]) & ((1 << 7 * width) - 1)
        at, end = at + 4 + width + length, at + 4 + width + length
        if length == (1 << 7 * width) - 1:  # unknown, as live streams write it
            return
    if end > size:
        raise _truncated(end, size)


def _check_pages(file: BinaryIO, size: int) -> None:
    """Checks that the last page of an Ogg file is complete and ends its stream."""
    tail = _read(file, max(0, size - (1 << 17)), 1 << 17)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[27 : 27 + page[26]] if len(page) > 27 else b""
    is_complete = segments and len(page) >= 27 + len(segments) + sum(segments)
    if not is_complete or not page[5] & 4:
        raise AudioError(
            "truncated (the last page does not end the Ogg stream); copy it again, or accept the "
            "end with: ffmpeg -i FILE -c copy NEW.ogg",
            "truncated",
        )


def check(file: BinaryIO) -> bool:
    """Compares the sizes in a file's header with the file.

    Returns:
        Whether the header has a placeholder instead of the size of the samples.

    Raises:
        AudioError: the file is empty, ends before its header says, or goes on after it.
    """
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise AudioError("the file is empty", "zero_length")
    head = _read(file, 0, 12)
    if layout := _CHUNKS.get(head[:4]):
        return _check_chunks(file, size, layout)
    if head[:4] == b".snd" and len(head) == 12:
        start, length = struct.unpack(">II", head[4:])
        if length < PLACEHOLDER and start + length > size:
            raise _truncated(start + length, size)
    elif head[4:8] == b"ftyp":
        _check_boxes(file, size)
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        _check_segment(file, size)
    elif head[:4] == b"OggS":
        _check_pages(file, size)
    return False


def is_mp3_cut(file: BinaryIO, first: int) -> bool:
    """Whether the header of an mp3 file (LAME's or Fraunhofer's) says more bytes than it has.

    Args:
        file: the file.
        first: position of the first frame of audio; the header is in the frame before.
    """
    position, size, begin = file.tell(), file.seek(0, os.SEEK_END), max(0, first - 4096)
    head = _read(file, begin, first - begin)
    file.seek(position)  # the decoder reads on from here
    for name in (b"Xing", b"Info", b"VBRI"):
        at = head.rfind(name)
        if at < 0:
            continue
        flags = int.from_bytes(head[at + 4 : at + 8])
        field = at + 10 if name == b"VBRI" else at + 8 + 4 * (flags & 1)
        if name == b"VBRI" or flags & 2:
            # The name is at most 36 bytes behind the start of the frame, from where it counts.
            return begin + at - 36 + int.from_bytes(head[field : field + 4]) > size
    return False
