"""The decoder's attention by kernel: milliseconds and TFLOP/s, forward, and with the backward pass.

    python benchmarks/attention.py [--kernels=auto,cudnn,xla] [--length=4352] [--segments=4]

One layer of FastSLM-4B on a row of --length tokens (4352: 15 minutes), packed from --segments equal
examples; 0: one example, and no segment ids. TFLOP/s count what causal attention needs if the row
is one example: 2 products forward and 5 backward, over half of the scores. A kernel that skips what
lies between examples can therefore exceed the device's peak. Kernels that this device does not have
are left out, with the reason. Ratios are of times, against the last kernel; the kernels alternate.
Last line: one JSON object.
"""

import json
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from absl import flags
from banner import print_banner
from step_harness import Case, compile_case, time_cases

from fastslm_jax import cli, sharding
from fastslm_jax.errors import UserError
from fastslm_jax.models import attention
from fastslm_jax.models.attention_arrays import CausalSegments

FLAGS = flags.FLAGS
CALLS = 10  # per timed call, so that the start of a call does not count


def define_flags() -> None:
    flags.DEFINE_list("kernels", ["auto", "cudnn", "xla"], "Names of config.model.attention.")
    flags.DEFINE_integer("rows", 1, "Rows.", lower_bound=1)
    flags.DEFINE_integer("length", 4352, "Tokens of a row.", lower_bound=2)
    flags.DEFINE_integer("segments", 4, "Examples of a row.", lower_bound=0)
    flags.DEFINE_integer("heads", 32, "Query heads.", lower_bound=1)
    flags.DEFINE_integer("kv_heads", 8, "Key-value heads.", lower_bound=1)
    flags.DEFINE_integer("head_dim", 128, "Width of a head.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of all arrays.")
    flags.DEFINE_integer("repeats", 5, "Timed calls; the median counts.", lower_bound=1)


def arrays() -> tuple[jax.Array, jax.Array, jax.Array, CausalSegments]:
    """query [rows, length, heads, head_dim], key and value, and the mask."""
    heads = (FLAGS.heads, FLAGS.kv_heads, FLAGS.kv_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(rng, (FLAGS.rows, FLAGS.length, n, FLAGS.head_dim), FLAGS.dtype)
        for rng, n in zip(keys, heads, strict=True)
    )
    ids = jnp.arange(FLAGS.length) * FLAGS.segments // FLAGS.length
    ids = jnp.broadcast_to(ids, (FLAGS.rows, FLAGS.length)) if FLAGS.segments else None
    return query, key, value, CausalSegments(ids)


def functions(name: str) -> tuple[Callable, Callable]:
    """The attention, and its value with the gradients of query, key and value.

    Raises:
        UserError: this device does not have the kernel.
    """
    kernel = attention.choose(name, jax.default_backend(), FLAGS.dtype, sharding.make_mesh())

    def both(query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments) -> tuple:
        out, backward = jax.vjp(lambda *inputs: kernel(*inputs, mask), query, key, value)
        return out, backward(out)

    return kernel, both


def repeated(case: Case) -> Case:
    call, gib = case
    return lambda: [call() for _ in range(CALLS)], gib


def main(_: list[str]) -> None:
    print_banner("Attention of a decoder layer, by kernel.", jax.devices()[0].device_kind)
    inputs, cases = arrays(), {}
    for name in FLAGS.kernels:
        try:
            for direction, function in zip(("forward", "both"), functions(name), strict=True):
                cases[name, direction] = repeated(compile_case(function, *inputs))
        except UserError as error:
            print(f"{name}: left out ({error})")
    if not cases:
        raise UserError("--kernels: this device has none of them")
    print("chosen: " + ", ".join(sorted(attention.CHOICES)))
    found = dict(zip(cases, time_cases(*cases.values()), strict=True))
    names = list(dict.fromkeys(name for name, _ in found))
    scores = FLAGS.rows * FLAGS.heads * FLAGS.length**2 / 2
    product = 2 * scores * FLAGS.head_dim
    print("| kernel | forward, ms | TFLOP/s | with backward, ms | TFLOP/s | GiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name in names:
        forward, both = (found[name, part]["seconds"] / CALLS for part in ("forward", "both"))
        ratio = both * CALLS / found[names[-1], "both"]["seconds"]
        rates = 2 * product / forward / 1e12, 7 * product / both / 1e12
        gib = found[name, "both"]["gib"]
        print(
            f"| {name} | {1e3 * forward:.2f} | {rates[0]:.3g} | {1e3 * both:.2f} | {rates[1]:.3g} "
            f"| {gib:.2f} | {ratio:.2f} |"
        )
        results[name] = {"forward": forward, "both": both, "gib": gib, "ratio": ratio}
    print(json.dumps(results))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
