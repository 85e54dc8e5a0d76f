"""Seconds of audio that are read of files of many formats, against what ffmpeg decodes of them.

    python benchmarks/audio_formats.py [FILE…]

Without FILE, the files of tests/made_audio.py are made: containers, codecs, and odd headers. The
reference is the `ffmpeg` command if it is installed, else all packets decoded by PyAV. Exit code 1
if a file is refused or differs by more than 0.05 s. Last line: one JSON object.
"""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import av
from banner import print_banner
from made_audio import FORMATS

from fastslm_jax import audio

TOLERANCE = 0.05  # seconds


def ffmpeg_seconds(path: pathlib.Path) -> float:
    """Seconds that the `ffmpeg` command decodes."""
    options = ["-ignore_length", "1"] if path.name == "no size.rf64" else []
    command = ["ffmpeg", "-v", "quiet", *options, "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-f", "s16le", "-ac", "1", "-ar", str(audio.SAMPLE_RATE), "-"]
    decoded = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
    return len(decoded) / 2 / audio.SAMPLE_RATE


def pyav_seconds(path: pathlib.Path) -> float:
    """Seconds of all packets that PyAV decodes, skipping those that it cannot."""
    options = {"ignore_length": "1"} if path.name == "no size.rf64" else {}
    seconds = 0.0
    with av.open(str(path), options=options) as container:
        for packet in container.demux(audio=0):
            with contextlib.suppress(av.FFmpegError):
                seconds += sum(frame.samples / frame.sample_rate for frame in packet.decode())
    return seconds


def main() -> None:
    has_ffmpeg = shutil.which("ffmpeg") is not None
    reference = ffmpeg_seconds if has_ffmpeg else pyav_seconds
    print_banner("Seconds read of each file, against ffmpeg.", device="CPU")
    print(f"{'file':28}{'read, s':>10}{'ffmpeg, s':>11}{'difference':>12}")
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(name) for name in sys.argv[1:]]
        if not paths:
            for name, make in FORMATS.items():
                paths.append(pathlib.Path(folder, name))
                paths[-1].write_bytes(make())
        for path in paths:
            expected = reference(path)
            try:
                seconds = len(audio.read_audio(path)) / audio.SAMPLE_RATE
            except audio.AudioError as error:
                print(f"{path.name:28}{'refused':>10}{expected:11.3f}  {error}")
                different += 1
                continue
            is_different = abs(seconds - expected) > TOLERANCE or audio.probe(path) != seconds
            different += is_different
            mark = "  differs" if is_different else ""
            print(f"{path.name:28}{seconds:10.3f}{expected:11.3f}{seconds - expected:12.4f}{mark}")
    result = {"files": len(paths), "different": different, "ffmpeg": has_ffmpeg}
    print(json.dumps(result))
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
