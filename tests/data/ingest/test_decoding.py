"""Decoding of container formats."""

import numpy as np
import pytest
from signals import SECOND

from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.manifest import read_clip, read_manifest


def test_mp4_containers(write_manifest, tmp_path):
    """A tone of 440 Hz survives AAC compression and resampling."""
    av = pytest.importorskip("av")
    with av.open(tmp_path / "a.m4a", "w") as file:
        stream = file.add_stream("aac", rate=44_100)
        stream.layout = "mono"
        tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    line = {"audio_filepath": "a.m4a", "duration": 1.0, "text": "a tone"}
    import_corpus(write_manifest(tmp_path, [line]), tmp_path / "out")
    clip = read_clip(read_manifest(tmp_path / "out")[0])
    spectrum = np.abs(np.fft.rfft(clip[4000:12_000]))
    assert spectrum.argmax() * SECOND / 8000 == pytest.approx(440, abs=2)
