"""Mutated files end in success, or in one line that names the problem.

`make fuzz` tries some 12 000 files; `make test` tries a few. Each example starts
from a valid file, changes some bytes or values, and hands it to the function that reads it for the
commands. Allowed ends: a result, or a UserError (one line, exit code 2). Anything else fails:
another exception, more than 20 s, or audio that is accepted without all of it being heard.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import struct

import av
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fastslm_jax import audio, sharding
from fastslm_jax.data import manifest
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import results
from fastslm_jax.inference import load
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import pretrained, tensors

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = int(os.environ.get("FASTSLM_FUZZ", "0"))  # of `make fuzz`, over all kinds of files
LIMIT = 20  # seconds
tried = {}  # {kind: number of files}


@pytest.fixture(autouse=True)
def count(request):
    """conftest.py prints the counts."""
    request.config.tried = tried


def fuzz(share: float, few: int):
    """Settings of a test that tries `share` of the files of `make fuzz`, and a few otherwise."""
    return settings(
        max_examples=max(few, round(EXAMPLES * share)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def one_line_or_success(kind: str):
    """Counts a file; a UserError of one line is fine, a hang is not."""
    tried[kind] = tried.get(kind, 0) + 1

    def stop(*_):
        raise AssertionError(f"took more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert "Traceback" not in message
        assert len(message) < 1000
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------- mutations

INTERESTING = (0, 1, 36, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFF000, 2_000_000_000, 2**31)
INTERESTING += (2**31 - 1, 2**32 - 1)


@st.composite
def mutations(draw) -> list[tuple]:
    """Changes of a file, at fractions of its length or in its first 200 bytes."""
    position = st.one_of(st.floats(0, 1), st.integers(0, 200))
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("flip"), position, st.integers(0, 7)),
                st.tuples(st.just("set"), position, st.binary(min_size=1, max_size=8)),
                st.tuples(st.just("size"), position, st.sampled_from(INTERESTING)),
                st.tuples(st.just("insert"), position, st.binary(min_size=1, max_size=64)),
                st.tuples(st.just("delete"), position, st.integers(1, 4000)),
                st.tuples(st.just("repeat"), position, st.integers(1, 4000)),
                st.tuples(st.just("cut"), position, st.just(0)),
            ),
            min_size=1,
            max_size=3,
        )
    )


def mutated(data: bytes, changes: list[tuple]) -> bytes:
    for name, where, what in changes:
        at = where if isinstance(where, int) else round(where * len(data))
        at = min(at, len(data))
        if name == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :]
        elif name == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif name == "size":
            data = data[:at] + struct.pack("<I", what) + data[at + 4 :]
        elif name == "insert":
            data = data[:at] + what + data[at:]
        elif name == "delete":
            data = data[:at] + data[at + what :]
        elif name == "repeat":
            data = data[:at] + data[at : at + what] * 2 + data[at + what :]
        elif name == "cut":
            data = data[:at]
    return data


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from((10**9, 10**30, -(10**400), 2**63)),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(("../x", "/etc/passwd", "a\0b", "\ud800", "zh-CN", "xx", "<|im_end|>", "nan")),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)


@st.composite
def changed_fields(draw, fields: dict) -> str:
    """JSON of an object with some of its values replaced, left out or added."""
    changed = dict(fields)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from([*fields, "unknown"]))
        if draw(st.integers(0, 5)) == 0:
            changed.pop(key, None)
        else:
            changed[key] = draw(values)
    return json.dumps(changed)


# ------------------------------------------------------------------------------------------- audio

CODECS = {  # {file name: (container, codec, rate)}
    "a.wav": ("wav", "pcm_s16le", 16_000),
    "b.wav": ("wav", "pcm_f32le", 44_100),
    "c.wav": ("wav", "pcm_mulaw", 8_000),
    "a.flac": ("flac", "flac", 16_000),
    "a.mp3": ("mp3", "libmp3lame", 16_000),
    "a.ogg": ("ogg", "vorbis", 16_000),
    "a.opus": ("ogg", "libopus", 48_000),
    "a.m4a": ("mp4", "aac", 16_000),
    "a.webm": ("webm", "libopus", 48_000),
    "a.aiff": ("aiff", "pcm_s16be", 16_000),
    "a.au": ("au", "pcm_s16be", 16_000),
}


def encoded(container: str, codec: str, rate: int) -> bytes:
    """Two seconds of a chirp."""
    time = np.arange(2 * rate) / rate
    samples = (0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32)
    file = io.BytesIO()
    if codec == "vorbis":  # ffmpeg's own encoder is experimental
        soundfile.write(file, samples, rate, format="OGG", subtype="VORBIS")
        return file.getvalue()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size or None
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def recordings() -> dict[str, bytes]:
    return {name: encoded(*how) for name, how in CODECS.items()}


def heard_by_soundfile(path: pathlib.Path) -> float:
    """Seconds that another decoder reads; 0 if it cannot read the file."""
    try:
        samples, rate = soundfile.read(path, always_2d=True)
        return len(samples) / rate
    except (soundfile.LibsndfileError, MemoryError, ValueError):
        return 0.0


@fuzz(0.4, 22)
@given(name=st.sampled_from(sorted(CODECS)), changes=mutations())
def test_audio(recordings, tmp_path_factory, name, changes):
    path = tmp_path_factory.mktemp("audio") / name
    path.write_bytes(mutated(recordings[name], changes))
    with one_line_or_success("audio"):
        seconds = audio.probe(path)
        heard = len(audio.read_audio(path)) / audio.SAMPLE_RATE
        assert abs(seconds - heard) < 0.05
        if name.endswith((".wav", ".flac", ".aiff", ".au")):  # others: decoders conceal differently
            assert heard > heard_by_soundfile(path) - 0.05
    shutil.rmtree(path.parent)


# --------------------------------------------------------------------------------- lines of JSON

CLIP = {
    "audio_filepath": "a.wav",
    "duration": 2.0,
    "text": "one two",
    "offset": 0.0,
    "lang": "en",
    "task": "asr",
    "speaker": "s",
    "recording": "r",
    "id": "1",
    "prompt": "write",
    "answer": "one two",
    "segments": [{"start": 0.0, "end": 2.0, "text": "one two"}],
}
PREDICTION = {
    "id": "1",
    "task": "asr",
    "lang": "en",
    "seconds": 2.0,
    "covered_seconds": 2.0,
    "reference": "one two",
    "hypothesis": "one too",
    "stop_reason": "eos",
}


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory, recordings) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.wav").write_bytes(recordings["a.wav"])
    return folder


def mutated_lines(fields: dict):
    """Bytes of a file of two lines: one with other values, or both with other bytes."""
    second = json.dumps(fields | {"id": "2"}) + "\n"
    plain = (json.dumps(fields) + "\n" + second).encode()
    return st.one_of(
        changed_fields(fields).map(lambda line: f"{line}\n{second}".encode()),
        mutations().map(lambda changes: mutated(plain, changes)),
    )


@fuzz(0.2, 20)
@given(data=mutated_lines(CLIP))
def test_manifest(corpus_folder, data):
    path = corpus_folder / "train.jsonl"
    path.write_bytes(data)
    with one_line_or_success("manifest"):
        for clip in manifest.read_manifest(path):
            assert len(manifest.read_clip(clip)) == clip.num_samples


@fuzz(0.1, 10)
@given(data=mutated_lines(PREDICTION))
def test_predictions(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("predictions")
    (folder / "mine.jsonl").write_bytes(data)
    with one_line_or_success("predictions"):
        rows = results.score_file(folder / "eval", folder / "mine.jsonl")
        assert sum(row[2]["utterances"] for row in rows) in (1, 2)
    assert sorted(os.listdir(folder)) in (["eval", "mine.jsonl"], ["mine.jsonl"])
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------- pretrained models


@fuzz(0.15, 15)
@given(st.data())
def test_pretrained_config(tmp_path_factory, data):
    name, build = data.draw(
        st.sampled_from(
            (
                ("demo_whisper", pretrained.whisper_from_config),
                ("demo_llm", pretrained.decoder_from_config),
            )
        )
    )
    text = (ROOT / "assets" / name / "config.json").read_text()
    content = data.draw(
        st.one_of(
            changed_fields(json.loads(text)).map(str.encode),
            mutations().map(lambda changes: mutated(text.encode(), changes)),
        )
    )
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_bytes(content)
    with one_line_or_success("config.json"):
        build(pretrained.read_config(folder), origin=str(folder))
    shutil.rmtree(folder)


@fuzz(0.1, 10)
@given(st.data())
def test_safetensors(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("weights")
    parts = {"a.safetensors": ("x", (4, 3)), "b.safetensors": ("y", (5,))}
    for file, (name, shape) in parts.items():
        save_file({name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}, folder / file)
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    target = data.draw(st.sampled_from(("a.safetensors", path.name, "values")))
    if target == "values":
        path.write_text(data.draw(changed_fields(index)))
    else:
        file = folder / target
        file.write_bytes(mutated(file.read_bytes(), data.draw(mutations())))
    with one_line_or_success("safetensors"):
        source = tensors.SafetensorsSource(folder)
        for key in sorted(source.keys()):
            assert source.read(key).shape == tuple(source.shape(key))
    shutil.rmtree(folder)


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@fuzz(0.015, 3)
@given(st.data())
def test_checkpoint(tmp_path_factory, data):
    """A checkpoint with a damaged file is refused, or its parameters are those that were saved."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    shutil.copytree(ROOT / "assets/demo_model", folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    file.write_bytes(mutated(file.read_bytes(), data.draw(mutations())))
    with one_line_or_success("checkpoint"):
        checkpoints = Checkpoints(folder, read_only=True)
        step = load.find_step(checkpoints, folder, None)
        config = load.saved_config(
            checkpoints,
            folder,
            step,
            str(ROOT / "assets/demo_whisper"),
            str(ROOT / "assets/demo_llm"),
        )
        setup = experiment.build(config)
        params = experiment.restore_params(setup, checkpoints, step, sharding.make_mesh())
        assert all(np.isfinite(leaf).all() for leaf in params.values())
    shutil.rmtree(folder.parent)
