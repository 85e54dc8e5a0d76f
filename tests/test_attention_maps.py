"""Attention maps: those of the model's own forward pass, for all windows; words and picture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax import attention_maps
from fastslm_jax.errors import UserError
from fastslm_jax.models.adapters import Pooling
from fastslm_jax.models.attention import AttentionKernel

LEVELS = (50, 25, 13)  # frames of the tiny model's windows of 1 s


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).normal(0, 3000, 16_000 * 5 - 3000).astype(np.int16)


@pytest.fixture(scope="module")
def arrays(model, params, samples):
    return attention_maps.maps(model, params, samples)


def test_shapes_and_names(arrays):
    assert {name: array.shape for name, array in arrays.items()} == {
        "log_mel": (5, 100, 16),
        "window_seconds": (5,),
        **{f"compressor_{k}": (5, 4, frames) for k, frames in enumerate(LEVELS, 1)},
        "semantic_distillation": (5, 3, 12),
        "detail_recovery_0": (5, 3, 88),
        "frame_level": (88,),
        "frame_seconds": (88,),
        "distillation_mass": (5, 3, 3),
        "detail_recovery_mass_0": (5, 3, 3),
        "tokens": (5, 3, 32),
    }
    assert arrays["window_seconds"].tolist() == [0, 1, 2, 3, 4]
    for level, step in ((1, 0.02), (2, 0.04), (3, 0.08)):
        starts = arrays["frame_seconds"][arrays["frame_level"] == level]
        np.testing.assert_allclose(starts, step * np.arange(LEVELS[level - 1]))


@pytest.mark.parametrize("name", ["compressor", "distillation", "detail_recovery"])
def test_attention_sums_to_one(arrays, name):
    found = {key: array for key, array in arrays.items() if name in key}
    assert found
    for array in found.values():
        assert array.min() >= 0
        np.testing.assert_allclose(array.sum(axis=-1), 1, rtol=1e-5)


def test_the_mass_of_a_level_is_the_sum_over_its_frames(arrays):
    mass, recovered = arrays["detail_recovery_mass_0"], arrays["detail_recovery_0"]
    np.testing.assert_allclose(mass[..., 1], recovered[..., 50:75].sum(axis=-1), rtol=1e-6)
    distilled = arrays["semantic_distillation"]
    np.testing.assert_allclose(
        arrays["distillation_mass"][..., 2], distilled[..., 8:].sum(axis=-1), rtol=1e-6
    )


def test_the_tokens_are_the_models(model, params, samples, arrays):
    windows, frames = model.window.cut(samples)
    recording = np.zeros((1, 5), np.int32)
    tokens = jax.jit(model.speech_tokens)(params, windows[None], frames[None], recording)
    np.testing.assert_allclose(arrays["tokens"].reshape(15, 32), tokens[0], rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Recorder(AttentionKernel):
    """Attends as the model does, and keeps its weights and the error of their output."""

    calls: list = dataclasses.field(default_factory=list)

    def __call__(self, query, key, value, mask=None, **options):
        out = super().__call__(query, key, value, mask, **options)
        scores = jnp.exp(jnp.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5)
        weights = scores / scores.sum(axis=-1, keepdims=True)
        error = jnp.abs(jnp.einsum("bnts,bsnh->btnh", weights, value) - out).max()
        self.calls.append((weights.mean(axis=1), error))
        return out


def test_the_maps_are_the_weights_of_the_attention_kernel(model, params, arrays):
    @jax.jit
    def record(mel):
        kernel = Recorder()
        features = model.encoder.apply({"params": params["encoder"]}, mel)
        recording = model.adapter.clone(attention_kernel=kernel)
        recording.apply({"params": params["hfq_former"]}, features)
        return kernel.calls

    names = ["compressor_1", "compressor_2", "compressor_3", "semantic_distillation"]
    names += ["self-attention", "detail_recovery_0"]
    for name, (weights, error) in zip(names, record(arrays["log_mel"]), strict=True):
        assert error < 1e-4
        if name != "self-attention":
            np.testing.assert_allclose(arrays[name], weights, rtol=1e-3, atol=1e-5)


def test_other_adapters_have_no_maps(model, params, samples):
    other = dataclasses.replace(model, adapter=Pooling(output_width=32))
    with pytest.raises(UserError, match=r"need config\.model\.adapter=hfq.* has Pooling"):
        attention_maps.maps(other, params, samples)


def test_coarse_frames_share_their_mass_among_the_frames_they_cover():
    level = np.array([1, 1, 1, 1, 1, 2, 2, 2])
    attention = np.array([0.1, 0, 0, 0, 0, 0.4, 0.2, 0.3])
    expected = [0.1 + 0.2, 0.2, 0.1, 0.1, 0.15 + 0.15]  # the last frame covers one beyond the end
    np.testing.assert_allclose(attention_maps.on_finest_level(attention, level), expected)


def test_labels(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("0.5\t1.25\tanna\n\\\t100\t200\n\n1.25\t2\tbought two\n")
    assert attention_maps.read_labels(file) == [(0.5, 1.25, "anna"), (1.25, 2.0, "bought two")]
    file.write_text("0.5\t1.25\tanna\n1.5 2 bought\n")
    with pytest.raises(UserError, match=r"line 2 is '1.5 2 bought'; write the start and end in"):
        attention_maps.read_labels(file)


def test_a_picture_shows_one_window_with_its_words(tmp_path, monkeypatch, arrays):
    drawn = []
    monkeypatch.setattr(attention_maps.plt, "close", drawn.append)
    words = [(0.1, 0.4, "before"), (3.2, 3.6, "inside"), (3.9, 4.6, "two words")]
    file = tmp_path / "maps.png"
    attention_maps.picture(file, arrays, window=3, words=words, seconds=4.8)
    assert file.read_bytes().startswith(b"\x89PNG")
    left = drawn[0].axes[::2]
    assert [text.get_text() for text in left[0].texts] == ["inside", "two words"]
    assert [axes.get_xlim() for axes in left] == [(3.0, 4.0)] * 5
    assert left[1].get_title() == "compressor 1, frames of 20 ms"
    assert left[-1].get_xlabel() == "seconds"
