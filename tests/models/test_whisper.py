"""Whisper encoder: position table, convolution, and scanned layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax.models.layers import Conv, LayerNorm, gelu, sinusoids
from fastslm_jax.models.whisper import EncoderBlock


def test_sinusoids():
    table = sinusoids(1500, 1280)
    assert table.shape == (1500, 1280)
    # Position 0: sines are 0, cosines are 1.
    np.testing.assert_array_equal(table[0], np.repeat([0.0, 1.0], 640))
    # The highest frequency is one radian per position, the lowest 1 / max_timescale.
    np.testing.assert_allclose(table[3, [0, 640]], [np.sin(3), np.cos(3)], atol=1e-6)
    np.testing.assert_allclose(table[1000, 639], np.sin(1000 / 10_000), atol=1e-6)
    with pytest.raises(ValueError, match="even width, got 7"):
        sinusoids(10, 7)


@pytest.mark.parametrize(("stride", "length"), [(1, 7), (2, 7), (2, 8)])
def test_conv_matches_lax_convolution(stride, length):
    x = jax.random.normal(jax.random.key(0), (2, length, 5))
    conv = Conv(4, stride=stride)
    variables = conv.init(jax.random.key(1), x)
    variables["params"]["bias"] = jnp.arange(4.0)
    layout = ("NWC", "WIO", "NWC")
    expected = jax.lax.conv_general_dilated(
        x, variables["params"]["kernel"], (stride,), [(1, 1)], dimension_numbers=layout
    )
    np.testing.assert_allclose(conv.apply(variables, x), expected + jnp.arange(4.0), atol=1e-5)


def test_gelu_is_exact():
    x = jnp.array([-2.0, 0.5, 1.0])
    np.testing.assert_allclose(
        gelu(x), x * (1 + jax.scipy.special.erf(x / np.sqrt(2))) / 2, rtol=1e-5
    )


def test_scanned_layers_match_a_plain_loop(model, params):
    encoder, weights = model.encoder, params["encoder"]
    mel = jax.random.normal(jax.random.key(2), (2, 100, encoder.num_mels))

    @jax.jit
    def unrolled(weights, mel):
        x = gelu(Conv(encoder.width).apply({"params": weights["conv1"]}, mel))
        x = gelu(Conv(encoder.width, stride=2).apply({"params": weights["conv2"]}, x))
        x = x + weights["positions"]
        for index in range(encoder.num_layers):
            block = jax.tree.map(lambda leaf, index=index: leaf[index], weights["layers"])
            layer = EncoderBlock(encoder.num_heads, encoder.mlp_dim, encoder.max_positions)
            x, _ = layer.apply({"params": block}, x)
        return LayerNorm().apply({"params": weights["final_norm"]}, x)

    scanned = jax.jit(lambda weights, mel: encoder.apply({"params": weights}, mel))(weights, mel)
    assert scanned.shape == (2, 50, 64)
    np.testing.assert_allclose(scanned, unrolled(weights, mel), atol=1e-5)


def test_layers_are_initialized_independently(params):
    kernel = params["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert kernel.shape == (2, 64, 64)
    assert not np.allclose(kernel[0], kernel[1])


def test_wrong_number_of_frames_raises(model, params):
    message = r"\(frames, bands\) = \(90, 16\); this encoder takes \(100, 16\)"
    with pytest.raises(ValueError, match=message):
        model.encoder.apply({"params": params["encoder"]}, jnp.zeros((1, 90, 16)))
