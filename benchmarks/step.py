"""What the train step's design is worth on this machine: step time and memory, each as a ratio measured in one run.

    python benchmarks/step.py [--minutes=10] [--repeats=5] [--torch] [--size=demo|full]

| row          | measured                                                | against                                              |
|--------------|---------------------------------------------------------|------------------------------------------------------|
| packed       | utterances packed into rows, seconds for all of them    | one utterance a row, padded to the longest           |
| chunked loss | logits of --loss_chunk labels at a time                 | logits of all tokens at once                         |
| frozen split | gradients and optimiser state for what is trained       | for every parameter                                  |
| attention    | gradient of a layer's attention over --minutes          | `jax.nn.dot_product_attention` in XLA, written mask  |
| long example | forward and backward of one recording of --minutes      | the exported PyTorch model, same weights and threads |
| encoding     | speech tokens of a recording of --minutes               | the same                                             |

The first four are the demo's model in float32 on seeded noise. With --torch (needs the `export` extra) come the rows against
PyTorch. --size=full is FastSLM-4B with random weights in bfloat16, and needs a GPU of 40 GiB: the long example also gives MFU.
Without a GPU those rows say "not measured". Memory is what XLA plans for the step's temporaries; of PyTorch on a CPU it is not
known. Last line: one JSON object.
"""

import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from fastslm_jax import chips, cli, devices, flops
from fastslm_jax import config as config_lib
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import packing, prompts
from fastslm_jax.errors import UserError
from fastslm_jax.inference import programs
from fastslm_jax.models import blockwise_attention, log_mel
from fastslm_jax.models.fastslm import largest_divisor
from fastslm_jax.plan import compile as plan
from fastslm_jax.training import experiment, optim
from fastslm_jax.training import step as steps
from fastslm_jax.training.checkpoint import Checkpoints

FLAGS = flags.FLAGS
WINDOW_BATCH = 4  # windows in the encoder at a time, at most, beside PyTorch
FULL_SIZE_FIGURES = (
    "step seconds",
    "MFU",
    "audio seconds per second",
    "peak GiB",
    "PyTorch over JAX",
)


def define_flags() -> None:
    flags.DEFINE_float("minutes", 10.0, "Of the long recording.")
    flags.DEFINE_integer("repeats", 5, "Timings; the median counts.")
    flags.DEFINE_integer("loss_chunk", 128, "Labels whose logits exist at a time.")
    flags.DEFINE_bool("torch", False, "Compare with the PyTorch model of the export.")
    flags.DEFINE_enum("size", "demo", ["demo", "full"], "The demo's model, or FastSLM-4B on a GPU.")


class Bench:
    """A model with its parameters, and its train step on a batch."""

    def __init__(self, config, params=None):
        self.config, self.setup = config, experiment.build(config)
        self.model, self.encoder = self.setup.model, self.setup.prompt_tokenizer()
        self.params = params or experiment.init_params(self.setup, one_device())

    def batch(
        self, rows: list[list[tuple[float, int]]], shape: packing.RowShape
    ) -> dict[str, np.ndarray]:
        """Rows of examples (seconds, tokens of the answer) → arrays."""
        rng, packed = np.random.default_rng(0), []
        for row in rows:
            parts = []
            for seconds, answer in row:
                samples = rng.normal(0, 3000, round(seconds * SAMPLE_RATE)).astype(np.int16)
                num_speech = self.model.window.count(len(samples)) * self.model.tokens_per_window
                prompt = self.encoder.encode("asr", None, None, num_speech)
                tokens = np.concatenate([prompt.tokens, rng.integers(1, 1000, answer)])
                mask = np.concatenate([np.zeros(len(prompt.tokens)), np.ones(answer)]).astype(
                    np.float32
                )
                parts.append(
                    (prompts.Encoded(tokens, mask, prompt.speech_start, num_speech), samples)
                )
            packed.append(
                packing.assemble(parts, shape, self.model.window, self.model.tokens_per_window)
            )
        return {name: np.stack([row[name] for row in packed]) for name in packed[0]}

    def step(self, shape: packing.RowShape, loss_chunk: int, trainable=config_lib.TRAINABLE):
        """(step function of state, frozen and batch; state, frozen)."""
        mask = optim.trainable_mask(sorted(self.params), trainable)
        trained, frozen = (
            {path: leaf for path, leaf in self.params.items() if mask[path] == side}
            for side in (True, False)
        )
        function = functools.partial(
            steps.train_step,
            model=self.model,
            optimizer=self.setup.optimizer,
            settings=steps.StepConfig(shape.labels, loss_chunk),
        )
        return function, steps.TrainState.create(trained, self.setup.optimizer), frozen

    def compile(self, function, *inputs):
        """(the function as a call without arguments, GiB that it takes at its peak: arguments, results and temporaries)."""
        compiled = jax.jit(function).lower(*inputs).compile()
        inputs = jax.device_put(inputs)
        return lambda: compiled(*inputs), plan.total_bytes(compiled.memory_analysis()) / 2**30


def one_device():
    from fastslm_jax import sharding

    return sharding.make_mesh(devices=jax.devices()[:1])


def in_turns(*sides) -> list[dict]:
    """Median seconds of calls, which take turns: the machine's speed drifts. Each side is (call, GiB or None)."""
    times = [[] for _ in sides]
    for repeat in range(FLAGS.repeats + 1):
        for side, (call, _) in zip(times, sides, strict=True):
            time.sleep(0.5)  # the other side's threads spin on after their work
            started = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:  # the first warms up
                side.append(time.perf_counter() - started)
    return [
        {"seconds": float(np.median(side)), "gib": gib}
        for side, (_, gib) in zip(times, sides, strict=True)
    ]


def whole_loss(model, params, batch) -> jax.Array:
    """Mean cross-entropy from the logits of all tokens."""
    logits = model.logits(params, model.hidden(params, batch))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.sum(losses * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


def chunked_loss(model, params, batch, shape, loss_chunk) -> jax.Array:
    sums = steps.batch_loss(model, params, batch, label_slots=shape.labels, loss_chunk=loss_chunk)
    return sums["loss"] / sums["labels"]


# ------------------------------------------------------------------------------------------------------------ the design


def packed_against_padded(bench: Bench) -> list[dict]:
    """24 utterances of 2 … 24 s: in rows of eight windows, and one in each row."""
    seconds = np.random.default_rng(1).uniform(2, 24, 24)
    examples = [(float(s), int(3 * s)) for s in seconds]
    window, per_window = bench.model.window, bench.model.tokens_per_window
    prompt = len(bench.encoder.encode("asr", None, None, 0).tokens)
    sizes = []
    for s, labels in examples:
        windows = window.count(round(s * SAMPLE_RATE))
        sizes.append(packing.Size(windows, prompt + windows * per_window + labels, labels))
    longest = packing.RowShape(
        *(max(getattr(size, field) for size in sizes) for field in ("windows", "tokens", "labels"))
    )
    shape = packing.RowShape(2 * longest.windows, 2 * longest.tokens, 2 * longest.labels)
    rows = [[examples[i] for i in row] for row in packing.pack(sizes, shape)]
    packed = bench.compile(*bench.step(shape, FLAGS.loss_chunk), bench.batch(rows, shape))
    padded = bench.compile(
        *bench.step(longest, FLAGS.loss_chunk),
        bench.batch([[example] for example in examples], longest),
    )
    return in_turns(packed, padded)


def chunked_against_whole(bench: Bench) -> list[dict]:
    """Gradients of the HFQ-Former and LoRA on one long row, by either loss."""
    shape, batch = long_row(bench)
    mask = optim.trainable_mask(sorted(bench.params), config_lib.TRAINABLE)
    trained, frozen = (
        {path: leaf for path, leaf in bench.params.items() if mask[path] == side}
        for side in (True, False)
    )
    losses = {
        "chunked": lambda params, batch: chunked_loss(
            bench.model, params, batch, shape, FLAGS.loss_chunk
        ),
        "whole": lambda params, batch: whole_loss(bench.model, params, batch),
    }
    return in_turns(
        *(
            bench.compile(
                jax.grad(lambda t, f, b, loss=loss: loss(optim.merge(t, f), b)),
                trained,
                frozen,
                batch,
            )
            for loss in losses.values()
        )
    )


def split_against_everything(bench: Bench) -> list[dict]:
    shape, batch = long_row(bench)
    everything = ((r".*positions", False), (r".*", True))
    return in_turns(
        *(
            bench.compile(*bench.step(shape, FLAGS.loss_chunk, table), batch)
            for table in (config_lib.TRAINABLE, everything)
        )
    )


def attention_against_jax(bench: Bench) -> list[dict]:
    """Causal attention of a layer over the tokens of the long example, forward and backward."""
    llm, (shape, _) = bench.model.llm, long_row(bench, FLAGS.minutes)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (llm.num_heads, llm.num_kv_heads, llm.num_kv_heads)
    inputs = [
        jax.random.normal(key, (1, shape.tokens, n, llm.head_dim))
        for key, n in zip(keys, heads, strict=True)
    ]
    mask = blockwise_attention.causal_mask(None, 0, shape.tokens)[:, None]

    def gradients(attend):
        return jax.grad(lambda *inputs: jnp.sum(jnp.sin(attend(*inputs))), argnums=(0, 1, 2))

    return in_turns(
        bench.compile(
            gradients(functools.partial(blockwise_attention.attention, is_causal=True)), *inputs
        ),
        bench.compile(
            gradients(
                functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
            ),
            *inputs,
        ),
    )


def long_row(bench: Bench, minutes: float = 3.0):
    """One recording that fills a row, with three answer tokens a second."""
    seconds = 60 * minutes
    labels, windows = int(3 * seconds), bench.model.window.count(round(seconds * SAMPLE_RATE))
    prompt = len(
        bench.encoder.encode("asr", None, None, windows * bench.model.tokens_per_window).tokens
    )
    shape = packing.RowShape(windows, -(-(prompt + labels) // 128) * 128, labels)
    return shape, bench.batch([[(seconds, labels)]], shape)


# --------------------------------------------------------------------------------------------------------------- PyTorch


def against_torch(bench: Bench, scratch: pathlib.Path, device: str) -> dict[str, list[dict]]:
    """The same weights through the export, which encodes as many windows at a time as we do."""
    try:
        import torch
        from transformers import AutoModel
    except ImportError:
        raise UserError("--torch needs PyTorch: pip install -e .[export]") from None
    from fastslm_jax.convert import exporting

    torch.set_num_threads(devices.cores())
    config, paths = bench.config, experiment.saved_paths(bench.params, bench.config.trainable)
    checkpoints = Checkpoints(scratch / "run")
    meta = {
        "config": json.loads(config.to_json_best_effort()),
        "row": 0,
        "bases": bench.setup.fingerprints(),
    }
    checkpoints.save(1, {path: bench.params[path] for path in paths}, {"step": jnp.int32(1)}, meta)
    checkpoints.wait()
    checkpoints.close()
    exporting.export(scratch / "run", scratch / "hf", "hf")
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    model = AutoModel.from_pretrained(scratch / "hf", trust_remote_code=True, dtype=dtype).to(
        device
    )
    model.requires_grad_(False)
    model.hfq_former.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "lora_" in name)

    seconds = 60 * FLAGS.minutes
    shape, batch = long_row(bench, FLAGS.minutes)
    group = largest_divisor(shape.windows, bench.model.window_batch or shape.windows)
    waveform = (
        np.random.default_rng(0).normal(0, 3000, round(seconds * SAMPLE_RATE)).astype(np.int16)
    )
    waveform = torch.from_numpy(waveform.astype(np.float32) / 32768).to(device)
    length = int((batch["segment_ids"][0] > 0).sum())
    tokens = torch.from_numpy(batch["tokens"][0, :length].astype(np.int64)).to(device)
    slots = torch.from_numpy(batch["speech_slot"][0, :length]).to(device)
    mask = torch.from_numpy(batch["loss_mask"][0, :length] > 0).to(device)
    labels = torch.from_numpy(batch["labels"][0, :length].astype(np.int64)).to(device)
    model.use_lora(True)

    def speech():
        with torch.no_grad():
            windows = model.windows(waveform).to(model.dtype)
            features = torch.cat(
                [model.encoder(part).last_hidden_state for part in windows.split(group)]
            )
        return model.hfq_former(features).flatten(0, 1)

    def forward_and_backward():
        model.zero_grad()
        found = speech()
        embeddings = model.llm.get_input_embeddings()(tokens)
        embeddings = torch.where(slots[:, None] >= 0, found[slots.clamp(min=0)], embeddings)
        hidden = model.llm.model(inputs_embeds=embeddings[None]).last_hidden_state[0]
        loss = torch.nn.functional.cross_entropy(
            model.llm.lm_head(hidden[mask]).float(), labels[mask]
        )
        loss.backward()
        return loss.item()

    def encode():
        model.speech_tokens(waveform, group)
        if device != "cpu":
            torch.cuda.synchronize()

    params, inputs = (
        optim.merge(bench.params, {}),
        [batch[name][0] for name in ("audio", "window_frames", "window_recording")],
    )
    inputs.append(np.full(len(inputs[0]), log_mel.LOWEST, np.float32))
    rows = {
        "long example": in_turns(
            bench.compile(*bench.step(shape, FLAGS.loss_chunk), batch), (forward_and_backward, None)
        ),
        "encoding": in_turns(
            (lambda: programs.encode(bench.model, params, *inputs, mesh=None), None), (encode, None)
        ),
    }
    if device != "cpu":
        rows["long example"][1]["gib"] = torch.cuda.max_memory_allocated() / 2**30
    return rows


# ------------------------------------------------------------------------------------------------------------- full size


def full_size(scratch: pathlib.Path) -> dict:
    """One 15-minute row of FastSLM-4B, random weights, bfloat16, on the GPU at hand."""
    import full_size_step

    config = config_lib.full_size()
    config.base.whisper, config.base.llm = str(scratch / "whisper"), str(scratch / "llm")
    full_size_step.write_bases(scratch, full_size_step.WHISPER, full_size_step.QWEN3)
    config.model.window_batch = 6
    bench = Bench(config)
    shape, batch = long_row(bench, 15.0)
    (result,) = in_turns(bench.compile(*bench.step(shape, config.loss_chunk), batch))
    chip = chips.of_device(jax.devices()[0])
    minimum = sum(flops.minimum(bench.model, shape, 1).values())
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "step seconds": result["seconds"],
        "MFU": minimum / result["seconds"] / chip.peak_flops if chip else None,
        "audio seconds per second": 900 / result["seconds"],
        "peak GiB": stats.get("peak_bytes_in_use", 0) / 2**30,
    } | (
        {"PyTorch over JAX": ratio(*against_torch(bench, scratch, "cuda")["long example"])}
        if FLAGS.torch
        else {}
    )


def ratio(ours: dict, other: dict, field: str = "seconds") -> float | None:
    return other[field] / ours[field] if ours[field] and other[field] else None


def main(_):
    report = {
        "device": jax.devices()[0].device_kind,
        "cpus": devices.cores(),
        "minutes": FLAGS.minutes,
    }
    has_gpu = jax.default_backend() == "gpu"
    if FLAGS.size == "full" and not has_gpu:
        raise UserError(
            "--size=full needs a GPU; on TPUs and without one see `python -m fastslm_jax.plan`"
        )
    rows = {}
    with tempfile.TemporaryDirectory(prefix="step.") as folder:
        scratch = pathlib.Path(folder)
        if FLAGS.size == "demo":
            bench = Bench(config_lib.small_size())
            rows["packed / padded"] = packed_against_padded(bench)
            rows["chunked / whole loss"] = chunked_against_whole(bench)
            rows["frozen split / everything"] = split_against_everything(bench)
            rows["attention, ours / jax.nn's"] = attention_against_jax(bench)
            if FLAGS.torch:
                config = config_lib.small_size()
                config.model.window_batch = WINDOW_BATCH
                config.model.lora.dropout = 0.0  # the export has none
                found = against_torch(
                    Bench(config, bench.params), scratch, "cuda" if has_gpu else "cpu"
                )
                rows |= {f"{name}, JAX / PyTorch": pair for name, pair in found.items()}
        full = full_size(scratch) if FLAGS.size == "full" else dict.fromkeys(FULL_SIZE_FIGURES)
    print(
        f"{'':<32}{'seconds':>10}{'against':>10}{'speed-up':>10}{'GiB':>8}{'against':>9}{'smaller':>9}"
    )

    def shown(value, form):
        return "–" if value is None else format(value, form)

    for name, (ours, other) in rows.items():
        faster, smaller = ratio(ours, other), ratio(ours, other, "gib")
        cells = (ours["seconds"], "10.3f"), (other["seconds"], "10.3f"), (faster, "9.2f")
        memory = (ours["gib"], "8.3f"), (other["gib"], "9.3f"), (smaller, "8.2f")
        print(f"{name:<32}" + "".join(f"{shown(*cell):>9}" for cell in (*cells, *memory)))
        report[name] = {"ours": ours, "against": other, "speed_up": faster, "memory_ratio": smaller}
    for name, value in full.items():
        print(
            f"{'full size, bfloat16: ' + name:<48}{'GPU: not measured' if value is None else format(value, '.3f')}"
        )
    print(json.dumps(report | {"full_size": full}))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
