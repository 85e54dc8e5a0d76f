"""The FLOP counter against arithmetic by hand, and the minimum against docs/performance.md."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from fastslm_jax import audio, flops, sharding
from fastslm_jax import config as config_lib
from fastslm_jax.data.packing import RowShape
from fastslm_jax.models import log_mel
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.attention import AttentionKernel, CausalSegments
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.training import optim, specs
from fastslm_jax.training import step as steps


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(function, *arrays) -> int:
    return flops.executed(jax.jit(function).trace(*arrays))


# ------------------------------------------------------------------------------------- executed

PRODUCT = 2 * 3 * 5 * 5  # of [3, 5] × [5, 5]


def chain(x, w, length=7):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=length)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x @ w, PRODUCT),
        (lambda x, w: jnp.einsum("td,hde->the", x, w.reshape(1, 5, 5)), PRODUCT),
        (chain, 7 * PRODUCT),
        (lambda x, w: jax.lax.fori_loop(0, 4, lambda _, y: y @ w, x), 4 * PRODUCT),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), PRODUCT),
        (lambda x, w: (x @ w, x @ (2 * w))[0], PRODUCT),  # the second is dead code
        (
            lambda x, w: jax.lax.conv(x[None, :, :], jnp.ones((4, 3, 2)), (1,), "VALID"),
            2 * (4 * 4) * (3 * 2),
        ),
        (jax.grad(lambda x, w: jnp.sum(chain(x, w))), 2 * 7 * PRODUCT),  # gradient of x only
        (jax.grad(lambda x, w: jnp.sum(chain(x, w)), (0, 1)), 3 * 7 * PRODUCT),
        (
            jax.grad(lambda x, w: jnp.sum(jax.checkpoint(chain)(x, w)), (0, 1)),
            (3 + 0) * 7 * PRODUCT,
        ),
    ],
)
def test_products_are_counted_each_time_they_run(function, expected):
    assert count(function, array(3, 5), array(5, 5)) == expected


def test_rematerialized_products_are_counted_twice():
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(x, w, wrap):
        return jnp.sum(jax.lax.scan(lambda x, _: (wrap(layer)(x, w), None), x, length=7)[0])

    def run(wrap):
        return count(
            jax.value_and_grad(lambda x, w: loss(x, w, wrap), (0, 1)), array(3, 5), array(5, 5)
        )

    assert run(lambda f: f) == 7 * 6 * PRODUCT
    assert run(jax.checkpoint) == 7 * 8 * PRODUCT
    assert (
        run(lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable))
        == 7 * 6 * PRODUCT
    )


def test_shard_map_counts_all_devices():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    rows = PartitionSpec(("data", "fsdp"))
    product = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )
    assert count(product, array(24, 5), array(5, 5)) == 8 * PRODUCT


def test_a_while_loop_with_products_is_an_error():
    def search(x, w):
        return jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ w, x)

    with pytest.raises(flops.UncountableError, match=r"a while loop .* matrix products"):
        count(search, array(3, 5), array(5, 5))


@pytest.mark.parametrize(
    ("length", "context", "block_q", "block_kv", "is_causal", "expected"),
    [
        (4, 4, 2, 2, True, 12),
        (4, 6, 2, 2, False, 24),
        (512, 512, 128, 256, True, 128 * (256 + 256 + 512 + 512)),
    ],
)
def test_visited_scores(length, context, block_q, block_kv, is_causal, expected):
    assert flops.visited_scores(length, context, block_q, block_kv, is_causal) == expected
    if is_causal:  # against a mask
        causal = np.tril(np.ones((length, context), bool))
        blocks = causal.reshape(length // block_q, block_q, context // block_kv, block_kv)
        assert blocks.any(axis=(1, 3)).sum() * block_q * block_kv == expected


@pytest.mark.parametrize("rows", [1, 3])
def test_triton_attention(rows):
    """Two products forward, seven backward, over 128 × 64 and 64 × 64 blocks of a causal mask."""
    heads, kv_heads, head_dim, length = 4, 2, 64, 256
    kernel, mask = AttentionKernel("triton_interpret"), CausalSegments()
    sizes = (heads, kv_heads, kv_heads)
    inputs = [array(rows, length, size, head_dim) for size in sizes]

    def loss(*inputs):
        return jnp.sum(kernel(*inputs, mask))

    forward = 2 * 128 * (128 + 256)
    backward = 7 * 64 * (64 + 128 + 192 + 256)
    unit = rows * heads * 2 * head_dim
    assert count(loss, *inputs) == forward * unit
    assert count(jax.grad(loss, (0, 1, 2)), *inputs) == (forward + backward) * unit


def test_splash_attention():
    """Two products forward, five backward; a causal mask visits 3 of 4 blocks of 512 × 512."""
    batch, heads, kv_heads, head_dim, length = 2, 4, 2, 64, 1024
    attend = AttentionKernel("splash_interpret")
    arrays = (
        array(batch, length, heads, head_dim),
        *2 * (array(batch, length, kv_heads, head_dim),),
    )

    def attention(mask):
        return lambda q, k, v: jnp.sum(attend(q, k, v, mask))

    scores = batch * heads * head_dim * 2 * 512 * 512
    # Output · output gradient of every token, outside the kernel.
    sums = 2 * batch * heads * length * head_dim
    causal, full = CausalSegments(), None
    assert count(attention(full), *arrays) == 2 * 4 * scores
    assert count(attention(causal), *arrays) == 2 * 3 * scores
    assert (
        count(jax.value_and_grad(attention(causal), (0, 1, 2)), *arrays)
        == (2 + 5) * 3 * scores + sums
    )


def test_heads_of_64_in_pairs():
    """Two products forward, five backward, without padding; padded keys are computed too."""
    attend = AttentionKernel("splash_interpret")
    query, key = array(2, 5, 4, 64), array(2, 70, 4, 64)

    def loss(*arrays):
        return jnp.sum(attend(*arrays, keys=65))

    product = 2 * (2 * 4 * 5 * 70 * 64)
    assert count(loss, query, key, key) == 2 * product
    assert count(jax.value_and_grad(loss, (0, 1, 2)), query, key, key) == (2 + 5) * product


# -------------------------------------------------------------------------------------- minimum


def test_minimum_of_a_fifteen_minute_row_at_full_size():
    """The table of docs/performance.md."""
    model = FastSLM(
        encoder=WhisperEncoder(1280, 32, 20, 5120, 128, 1500),
        adapter=HFQFormer(2560),
        llm=Decoder(151_936, 2560, 36, 32, 8, 128, 9728, lora=LoRA(16)),
    )
    terms = flops.minimum(model, RowShape(windows=30, tokens=6144, labels=4608))
    assert {name: round(value / 1e9) for name, value in terms.items()} == {
        "log-mel": 19,
        "encoder convolutions": 531,
        "encoder projections": 56_623,
        "encoder attention": 11_059,
        "HFQ-Former downsamplers": 2_544,
        "HFQ-Former compressors": 188,
        "HFQ-Former detail recovery": 2_807,
        "HFQ-Former projection": 29,
        "decoder projections": 89_292,
        "decoder LoRA": 1_218,
        "decoder attention": 33_403,
        "loss": 7_169,
    }
    assert sum(terms.values()) == 204_882_475_885_056


@pytest.fixture(scope="module")
def count_step(model):
    """count_step(remat) → FLOPs of loss and gradients on ROWS rows, with XLA attention."""
    trainable = optim.trainable_mask(
        sorted(flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")),
        config_lib.full_size().trainable,
    )

    def run(remat="none") -> int:
        tried = dataclasses.replace(model, llm=model.llm.clone(remat=remat))
        params = jax.eval_shape(tried.init, jax.random.key(0))
        trained, frozen = optim.split(params, trainable)
        batch = {
            name: jax.ShapeDtypeStruct((ROWS, *shape), dtype)
            for name, (shape, dtype) in specs.row_arrays(tried, ROW).items()
        }

        def loss(trained, frozen, batch):
            merged = optim.merge(trained, frozen)
            return steps.batch_loss(tried, merged, batch, label_slots=ROW.labels, loss_chunk=16)[
                "loss"
            ]

        return flops.executed(jax.jit(jax.value_and_grad(loss)).trace(trained, frozen, batch))

    return run


ROW, ROWS = RowShape(windows=4, tokens=128, labels=48), 3


def test_a_step_executes_the_minimum_and_three_known_extras(model, count_step):
    llm, former = model.llm, model.adapter
    length, heads = ROW.tokens, llm.num_heads * llm.head_dim
    # 1. The row is one attention block, so the scores above the diagonal are computed and masked.
    masked = llm.num_layers * 3 * 2 * 2 * (length * length - length * (length + 1) // 2) * heads
    # 2. The backward pass of attention recomputes the scores.
    tokens, layers = former.stage_tokens, former.detail_recovery_layers
    compressed = former.compression_size
    levels = [-(-model.encoder.max_positions // 2**level) for level in range(len(tokens))]
    read = (
        sum(map(operator.mul, tokens, levels))
        + compressed * sum(tokens)
        + layers * compressed * (compressed + sum(levels))
    )
    scores = (
        llm.num_layers * 2 * length * length * heads + ROW.windows * 2 * read * model.encoder.width
    )
    # 3. The key and value projections also compute the input gradient of the first level.
    features = layers * 2 * 2 * ROW.windows * model.encoder.max_positions * model.encoder.width**2
    minimum = sum(flops.minimum(model, ROW, ROWS).values())
    assert count_step() == minimum + ROWS * (masked + scores + features)


def test_full_remat_reruns_every_decoder_layer_but_its_last_product(model, count_step):
    llm = model.llm
    length, heads, kv = ROW.tokens, llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    weights = 2 * llm.width * (heads + kv) + 2 * llm.width * llm.mlp_dim
    adapters = llm.lora.rank * (
        2 * (llm.width + heads) + 2 * (llm.width + kv) + 2 * (llm.width + llm.mlp_dim) + llm.mlp_dim
    )
    attention = 2 * 2 * length * length * heads
    again = llm.num_layers * (2 * length * (weights + adapters) + attention)
    assert count_step("full") - count_step() == ROWS * again


def test_log_mel(model):
    """One window: 100 frames × ([200, 201] for cosines and for sines, then [201, 16])."""
    windows = jax.ShapeDtypeStruct((1, 1, model.window.samples + 2 * audio.CONTEXT), jnp.int16)
    slots = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = count(
        lambda *arrays: log_mel.log_mel(*arrays, model.encoder.num_mels), windows, slots, slots
    )
    assert (
        counted
        == 2 * 100 * (200 * 402 + 201 * 16)
        == flops.minimum(model, RowShape(1, 1, 0))["log-mel"]
    )
