"""What each design choice of the train step is worth: step time and memory, with and without it.

    python benchmarks/step.py [--minutes=10] [--repeats=5] [--torch] [--size=demo|full]
        [--attention=auto] [--trace=DIR]

| row          | measured                                | against                              |
|--------------|-----------------------------------------|--------------------------------------|
| packed       | utterances packed into rows             | one utterance per row, padded        |
| chunked loss | logits of --loss_chunk labels at a time | logits of all tokens at once         |
| frozen split | gradients of the trained weights        | gradients of all weights             |
| attention    | a layer's attention over --minutes      | `jax.nn.dot_product_attention`, XLA  |
| long example | forward and backward of --minutes       | the exported PyTorch model           |
| encoding     | speech tokens of --minutes              | the exported PyTorch model           |

The first four rows use the demo's model in float32 on seeded noise. The PyTorch rows need --torch
(the `export` extra) and use the same weights and number of threads. --size=full is FastSLM-4B with
random weights in bfloat16 and needs a GPU with 40 GiB; its long example also gives MFU. Memory is
what XLA plans for arguments, results and temporaries; PyTorch's on a CPU is unknown. Each ratio
comes from one run in which both sides alternate. Last line: one JSON object.
"""

import functools
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import full_size
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from banner import print_banner
from step_harness import Batch, Bench, compile_case, time_cases

from fastslm_jax import chips, cli, devices, flops
from fastslm_jax import config as config_lib
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import packing
from fastslm_jax.errors import UserError
from fastslm_jax.models import blockwise_attention
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.training import optim
from fastslm_jax.training import step as steps

FLAGS = flags.FLAGS
PYTORCH_WINDOW_BATCH = 4  # windows in the encoder at a time, on both sides
FULL_SIZE_FIGURES = (
    "step seconds",
    "MFU",
    "audio seconds per second",
    "peak GiB",
    "planned GiB",
    "PyTorch over JAX",
)
Row = list[dict[str, float | None]]


def define_flags() -> None:
    flags.DEFINE_float("minutes", 10.0, "Length of the long recording.")
    flags.DEFINE_integer("repeats", 5, "Timed calls of each side; the median counts.")
    flags.DEFINE_integer("loss_chunk", 128, "Labels whose logits are in memory at a time.")
    flags.DEFINE_bool("torch", False, "Compare with the exported PyTorch model.")
    flags.DEFINE_string("attention", "auto", "With --size=full: config.model.attention.")
    flags.DEFINE_string("trace", "", "With --size=full: folder for a trace of one step.")
    flags.DEFINE_enum("size", "demo", ["demo", "full"], "The demo's model, or FastSLM-4B on a GPU.")


# ------------------------------------------------------------------------------- the demo's model


def packed_against_padded(bench: Bench) -> Row:
    """24 utterances of 2 to 24 s, packed or one per row."""
    seconds = np.random.default_rng(1).uniform(2, 24, 24)
    examples = [(float(s), int(3 * s)) for s in seconds]
    window, tokens_per_window = bench.model.window, bench.model.tokens_per_window
    prompt = len(bench.tokenizer.encode("asr", None, None, 0).tokens)
    sizes = []
    for s, labels in examples:
        windows = window.count(round(s * SAMPLE_RATE))
        sizes.append((windows, prompt + windows * tokens_per_window + labels, labels))
    sizes = np.array(sizes)
    longest = packing.RowShape(*np.max(sizes, axis=0).tolist())
    shape = packing.RowShape(2 * longest.windows, 2 * longest.tokens, 2 * longest.labels)
    rows = [[examples[i] for i in row] for row in packing.pack(sizes, shape)]
    padded = [[example] for example in examples]
    return time_cases(
        compile_case(*bench.step(shape), bench.batch(rows, shape)),
        compile_case(*bench.step(longest), bench.batch(padded, longest)),
    )


def whole_loss(model: FastSLM, params: dict, batch: Batch) -> jax.Array:
    """Mean cross-entropy from the logits of all tokens."""
    logits = model.logits(params, model.hidden(params, batch))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.sum(losses * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


def chunked_loss(model: FastSLM, params: dict, batch: Batch, label_slots: int) -> jax.Array:
    sums = steps.batch_loss(
        model, params, batch, label_slots=label_slots, loss_chunk=FLAGS.loss_chunk
    )
    return sums["loss"] / sums["labels"]


def chunked_against_whole(bench: Bench) -> Row:
    """Gradients of the HFQ-Former and LoRA on one long row, with either loss."""
    shape, batch = bench.long_row()
    mask = optim.trainable_mask(sorted(bench.params), config_lib.TRAINABLE)
    trained, frozen = optim.split(bench.params, mask)

    def gradients(loss: Callable[..., jax.Array]) -> Callable:
        return jax.grad(lambda t, f, batch: loss(bench.model, optim.merge(t, f), batch))

    chunked = functools.partial(chunked_loss, label_slots=shape.labels)
    losses = (chunked, whole_loss)
    return time_cases(*(compile_case(gradients(loss), trained, frozen, batch) for loss in losses))


def split_against_everything(bench: Bench) -> Row:
    shape, batch = bench.long_row()
    everything = ((r".*positions", False), (r".*", True))
    tables = (config_lib.TRAINABLE, everything)
    return time_cases(*(compile_case(*bench.step(shape, table), batch) for table in tables))


def attention_against_jax(bench: Bench) -> Row:
    """Causal attention of a layer over the tokens of the long example, forward and backward."""
    llm, (shape, _) = bench.model.llm, bench.long_row(FLAGS.minutes)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (llm.num_heads, llm.num_kv_heads, llm.num_kv_heads)
    inputs = [
        jax.random.normal(key, (1, shape.tokens, n, llm.head_dim))
        for key, n in zip(keys, heads, strict=True)
    ]
    mask = blockwise_attention.causal_mask(None, 0, shape.tokens)[:, None]

    def gradients(attend: Callable[..., jax.Array]) -> Callable:
        return jax.grad(lambda *inputs: jnp.sum(jnp.sin(attend(*inputs))), argnums=(0, 1, 2))

    ours = functools.partial(blockwise_attention.attention, is_causal=True)
    theirs = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
    return time_cases(*(compile_case(gradients(attend), *inputs) for attend in (ours, theirs)))


def demo_rows(scratch: pathlib.Path) -> Iterator[tuple[str, Row]]:
    bench = Bench(config_lib.small_size())
    yield "packed / padded", packed_against_padded(bench)
    yield "chunked / whole loss", chunked_against_whole(bench)
    yield "frozen split / everything", split_against_everything(bench)
    yield "attention, ours / jax.nn's", attention_against_jax(bench)
    if FLAGS.torch:
        from step_pytorch import against_pytorch

        config = config_lib.small_size()
        config.model.window_batch = PYTORCH_WINDOW_BATCH
        config.model.lora.dropout = 0.0  # the exported model has no dropout
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        rows = against_pytorch(Bench(config, bench.params), scratch, device)
        for name, row in rows.items():
            yield f"{name}, JAX / PyTorch", row


# -------------------------------------------------------------------------------------- full size


def full_size_figures(scratch: pathlib.Path) -> dict[str, float | None]:
    """One 15-minute row of FastSLM-4B with random weights in bfloat16, on a GPU."""
    config = full_size.write_bases(scratch)
    config.model.window_batch, config.model.attention = 8, FLAGS.attention
    bench = Bench(config)
    shape, batch = bench.long_row(15.0)
    case = compile_case(*bench.step(shape), batch)
    (result,) = time_cases(case)
    if FLAGS.trace:
        with jax.profiler.trace(FLAGS.trace):
            jax.block_until_ready(case[0]())
    chip = chips.of_device(jax.devices()[0])
    minimum = sum(flops.minimum(bench.model, shape, 1).values())
    stats = jax.devices()[0].memory_stats() or {}
    figures = {
        "step seconds": result["seconds"],
        "MFU": minimum / result["seconds"] / chip.peak_flops if chip else None,
        "audio seconds per second": 900 / result["seconds"],
        "peak GiB": stats.get("peak_bytes_in_use", 0) / 2**30,
        "planned GiB": result["gib"],
    }
    if FLAGS.torch:
        from step_pytorch import against_pytorch

        row = against_pytorch(bench, scratch, "cuda")["long example"]
        figures["PyTorch over JAX"] = ratio(*row)
    return figures


# ----------------------------------------------------------------------------------------- output


def ratio(ours: dict, other: dict, field: str = "seconds") -> float | None:
    return other[field] / ours[field] if ours[field] and other[field] else None


def print_row(name: str, ours: dict, other: dict) -> None:
    cells = (
        (ours["seconds"], 10, 3),
        (other["seconds"], 10, 3),
        (ratio(ours, other), 10, 2),
        (ours["gib"], 8, 3),
        (other["gib"], 9, 3),
        (ratio(ours, other, "gib"), 9, 2),
    )
    shown = (
        f"{'–':>{width}}" if value is None else f"{value:{width}.{digits}f}"
        for value, width, digits in cells
    )
    print(f"{name:<32}{''.join(shown)}", flush=True)


def main(_: list[str]) -> None:
    print_banner("Design choices of the train step, each against the alternative.")
    if FLAGS.size == "full" and jax.default_backend() != "gpu":
        raise UserError("--size=full needs a GPU; for TPUs see `python -m fastslm_jax.plan`")
    if FLAGS.torch and importlib.util.find_spec("torch") is None:
        raise UserError("--torch needs PyTorch: pip install -e .[export]")
    report = {
        "device": jax.devices()[0].device_kind,
        "cpus": devices.cores(),
        "minutes": FLAGS.minutes,
    }
    full = dict.fromkeys(FULL_SIZE_FIGURES)
    with tempfile.TemporaryDirectory(prefix="step.") as folder:
        scratch = pathlib.Path(folder)
        if FLAGS.size == "demo":
            columns = f"{'seconds':>10}{'against':>10}{'speed-up':>10}"
            print(f"{'':<32}{columns}{'GiB':>8}{'against':>9}{'smaller':>9}", flush=True)
            for name, (ours, other) in demo_rows(scratch):
                print_row(name, ours, other)
                report[name] = {
                    "ours": ours,
                    "against": other,
                    "speed_up": ratio(ours, other),
                    "memory_ratio": ratio(ours, other, "gib"),
                }
        else:
            full |= full_size_figures(scratch)
    for name, value in full.items():
        shown = "not measured" if value is None else format(value, ".3f")
        print(f"{'full size, bfloat16: ' + name:<48}{shown}")
    print(json.dumps(report | {"full_size": full}))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
