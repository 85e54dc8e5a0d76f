"""The least-squares fit of the projection: timing of words, the fit, and what it changes."""

import json
import shutil

import jax
import numpy as np
import pytest
import soundfile

from configs import demo
from fastslm_jax import sharding
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment, fit_projection
from fastslm_jax.training.checkpoint import Checkpoints

TEXTS = {  # of assets/recordings
    "sentence1": "please call daniel about the recipe on monday",
    "sentence2": "i would like eleven green chairs and two cookies please",
    "sentence3": "please send the report to thomas before monday afternoon",
}


def test_the_loud_part_of_a_clip():
    samples = np.zeros(SAMPLE_RATE, np.int16)
    samples[4_800:9_600] = 1000
    samples[9_600:] = 10  # 40 dB below
    assert fit_projection.loud_part(samples) == (0.3, 0.6)


def test_text_tokens_share_the_time_by_their_letters():
    # Tokens of 1 + 0.5 and 4 + 0.5 letters, from 1 to 5 s: the border is at 2 s.
    spans = np.array([0.0, 0.5, 1.5, 3.0, 4.5, 6.0])
    shares = fit_projection.shares([1, 4], 1.0, 5.0, spans)
    expected = [
        [0, 0],  # silence
        [1, 0],  # half of the span is speech
        [1 / 3, 2 / 3],
        [0, 1],
        [0, 0],  # a third of the span is speech
    ]
    np.testing.assert_allclose(shares, expected, atol=1e-9)


def test_least_squares_finds_the_kernel_and_scales_it():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(8, 5)), rng.normal(size=5)
    sums = fit_projection.LeastSquares()
    for _ in range(10):
        x = rng.normal(3.0, 1.0, size=(100, 8)).astype(np.float32)
        sums.add(x, x @ kernel + bias)
    found, found_bias = sums.solve(deviation=1.0)
    ratio = 1 / np.sqrt(np.sum(kernel**2) / 5)
    np.testing.assert_allclose(found, ratio * kernel, atol=0.05)
    outputs = rng.normal(3.0, 1.0, size=(1000, 8)) @ found + found_bias
    assert outputs.std(axis=0).mean() == pytest.approx(1.0, abs=0.15)
    np.testing.assert_allclose(outputs.mean(axis=0), 3 * kernel.sum(axis=0) + bias, atol=0.3)


@pytest.fixture
def config(tmp_path):
    """The demo's first stage on a manifest of 21 clips."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = []
    for name, text in TEXTS.items():
        shutil.copy(f"assets/recordings/{name}.flac", folder)
        seconds = soundfile.info(folder / f"{name}.flac").duration
        line = {"audio_filepath": f"{name}.flac", "duration": seconds, "text": text, "lang": "en"}
        lines += [json.dumps(line | {"id": f"{name}-{number}"}) for number in range(7)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = demo.get_config(f"1,{tmp_path}").unlock()
    for source in config.data.train.values():
        source.path = str(folder / "train.jsonl")
    return config


@pytest.mark.parametrize("adapter", ["hfq", "wq_former"])
def test_the_fit_changes_the_projection_only(config, tmp_path, adapter):
    config.model.adapter = adapter
    report = fit_projection.run(config, tmp_path / "fitted", count=21, seconds=6.0)
    assert (report["clips"], report["held_out"] > 5) == (21, True)
    assert report["correct"] > 2 * report["most_frequent"]  # all clips occur in both parts

    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    setup = experiment.build(config, mesh=mesh)
    initial = experiment.init_params(setup, mesh)
    checkpoints = Checkpoints(tmp_path / "fitted", read_only=True)
    fitted = experiment.restore_params(setup, checkpoints, 0, mesh)
    changed = {path for path in initial if not np.array_equal(initial[path], fitted[path])}
    group = setup.model.adapter.GROUP
    assert changed == {f"{group}/projection/kernel", f"{group}/projection/bias"}


def test_too_few_clips(config, tmp_path):
    with pytest.raises(UserError, match="0 transcribed clips of at most 1 s, and the fit needs 20"):
        fit_projection.run(config, tmp_path / "fitted", count=21, seconds=1.0)
    assert not (tmp_path / "fitted").exists()
