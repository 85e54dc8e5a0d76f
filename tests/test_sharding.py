"""The mesh over eight devices, and where parameters and rows lie on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastslm_jax import sharding
from fastslm_jax.errors import UserError
from fastslm_jax.models.lora import Projection


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({}, {"data": 8, "fsdp": 1, "tensor": 1}),
        ({"data": 2, "fsdp": -1, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 1, "fsdp": 4, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}),
    ],
)
def test_meshes(axes, shape):
    assert dict(sharding.make_mesh(**axes).shape) == shape


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"data": 3},
            r"\{'data': 3, 'fsdp': 1, 'tensor': 1\} does not fit 8 devices; its sizes must multiply to that number",
        ),
        ({"data": -1, "fsdp": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "one at most is -1"),
        ({"data": 0}, "sizes are positive"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**axes)


@pytest.mark.parametrize(
    ("asked", "devices", "nearest"),
    [
        ({"data": 3, "fsdp": 2, "tensor": 1}, 8, {"data": 4, "fsdp": 2, "tensor": 1}),
        ({"data": -1, "fsdp": 16, "tensor": 1}, 8, {"data": 1, "fsdp": 8, "tensor": 1}),
        ({"data": -1, "fsdp": 6, "tensor": 2}, 32, {"data": 2, "fsdp": 8, "tensor": 2}),
    ],
)
def test_the_nearest_mesh(asked, devices, nearest):
    assert sharding.nearest_mesh(asked, devices) == nearest


def test_slices_lie_along_data():
    """Two slices of four chips: only `data` crosses from one to the other."""
    pytest.importorskip("libtpu")
    from fastslm_jax import chips

    devices = chips.parse_topology("v5e:2x2x2").devices()
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(
        UserError, match="data must be a multiple of the 2 slices, which lie along it"
    ):
        sharding.make_mesh(data=1, fsdp=8, devices=devices)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_the_table_covers_the_model_and_every_pattern_is_needed(params, mesh):
    shardings = sharding.parameter_shardings(flatten_dict(params, sep="/"), mesh)
    assert set(shardings) == set(flatten_dict(params, sep="/"))
    assert {spec for _, spec in sharding.PARAMETER_TABLE} == {
        placed.spec for placed in shardings.values()
    }


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("llm/embed_tokens", P("tensor", "fsdp")),
        ("llm/layers/query/kernel", P(None, "fsdp", "tensor")),
        ("llm/layers/down/kernel", P(None, "tensor", "fsdp")),
        ("llm/layers/down/lora_a", P(None, "fsdp", None)),
        ("llm/layers/down/lora_b", P(None, None, "fsdp")),
        ("llm/layers/query_norm/scale", P()),
        ("encoder/layers/mlp_in/kernel", P(None, "fsdp", "tensor")),
        ("encoder/conv1/kernel", P(None, "fsdp", None)),
        ("hfq_former/downsampler_1/conv2/kernel", P(None, "fsdp", None)),
        ("hfq_former/detail_recovery_0/self_attention/query/kernel", P("fsdp", None)),
        ("hfq_former/compressor_1/query", P()),
    ],
)
def test_where_parameters_lie(params, mesh, path, spec):
    leaves = flatten_dict(params, sep="/")
    assert sharding.parameter_shardings({path: leaves[path]}, mesh)[path].spec == spec


def test_a_device_holds_its_part_only(params, mesh):
    path = "llm/layers/query/kernel"
    leaf = flatten_dict(params, sep="/")[path]
    placed = jax.device_put(leaf, sharding.parameter_shardings({path: leaf}, mesh)[path])
    assert leaf.shape == (2, 32, 64)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 16, 32)}


def test_parameters_that_do_not_fit_are_named(mesh):
    def place(path, shape):
        sharding.parameter_shardings({path: jax.ShapeDtypeStruct(shape, np.float32)}, mesh)

    with pytest.raises(
        UserError,
        match=r"parameter llm/gadget \(3,\) matches no pattern of sharding.PARAMETER_TABLE; add one",
    ):
        place("llm/gadget", (3,))
    message = (
        r"parameter llm/layers/query/kernel \(2, 7, 64\): dimension 1 does not divide over fsdp=2; "
        r"choose config.mesh.fsdp among the divisors of 7, the nearest are 1 and 7"
    )
    with pytest.raises(UserError, match=message):
        place("llm/layers/query/kernel", (2, 7, 64))


def test_a_table_with_two_dimensions_on_one_axis_is_refused(mesh, monkeypatch):
    monkeypatch.setattr(sharding, "PARAMETER_TABLE", ((r".*", P(None, "fsdp", "fsdp")),))
    leaf = jax.ShapeDtypeStruct((2, 8, 64), np.float32)
    with pytest.raises(
        UserError,
        match=r"parameter llm/gate \(2, 8, 64\): .* puts two of its dimensions on one mesh axis",
    ):
        sharding.parameter_shardings({"llm/gate": leaf}, mesh)


def test_batches_must_divide(mesh):
    sharding.check_batch(8, accumulate=2, mesh=mesh)
    message = r"global_batch_size=7 does not divide over data × fsdp = 4 devices in 2 micro-batches; the nearest that does is 8"
    with pytest.raises(UserError, match=message):
        sharding.check_batch(7, accumulate=2, mesh=mesh)


def test_rows_lie_over_data_and_fsdp(mesh):
    tokens = np.arange(8 * 3).reshape(8, 3)
    placed = sharding.shard_batch({"tokens": tokens}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(
    ("number", "near", "divisors"), [(24, 5, [4, 6]), (24, 6, [6, 8]), (7, 8, [7]), (7, 0, [1])]
)
def test_nearest_divisors(number, near, divisors):
    assert sharding.nearest_divisors(number, near) == divisors


def test_a_projection_gathers_its_weights_and_leaves_rows_where_they_are():
    """The kernel lies over fsdp and the inputs are whole: only the tables say that the result lies by rows and columns."""
    mesh = sharding.make_mesh(2, 2, 2)
    layer = Projection(16, name="gate")
    x, kernel = jnp.ones((8, 4, 32)), jnp.ones((32, 16))

    def apply(x, kernel):
        with sharding.activations_on(mesh):
            return layer.apply({"params": {"kernel": kernel}}, x)

    lies = [NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp", "tensor"))]
    compiled = jax.jit(apply, in_shardings=lies).lower(x, kernel).compile()
    assert compiled.output_shardings.is_equivalent_to(
        NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3
    )
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert len(gathered) == 1
    assert "f32[32,8]" in gathered[0]  # the kernel, whole over fsdp, half of its columns
    np.testing.assert_array_equal(
        jax.jit(apply, in_shardings=lies)(x, kernel), np.full((8, 4, 16), 32.0)
    )
