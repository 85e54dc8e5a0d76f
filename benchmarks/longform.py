"""Memory and time by the length of a recording, in one context.

    python benchmarks/longform.py --checkpoint=runs/demo/stage3 [--minutes=1,5,15,60,240,480,1440]    measured, small model
    python benchmarks/longform.py --compile=v6e,v5p [--kv_cache=bfloat16] [--minutes=…]              full size, one TPU chip

Measured: a process of its own for each length hears a synthetic recording (a summary of 64 tokens, so that the recording and not
the answer is measured) and reports the most memory in use and the time without compilation, also of the encoder alone.

Compiled: the programs of FastSLM-4B in bfloat16 are compiled ahead of time for one chip by the TPU compiler, and the table adds
the parameters, the cache, and the most that a program takes beside them. Its seconds are the least that the chip's peak rates
allow, not a measurement. The cache has room for the recording, the prompt and the answer of a summary (`long_form.budget`). Needs
libtpu (pip install libtpu).

The last line is JSON: a list of {minutes, peak_gib, seconds, device, kind: measured | compiled, …}. --plot=FILE.png draws it,
with the lists of earlier runs named by --with=FILE.json,…
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
if any(argument.startswith("--compile") for argument in sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"

import json
import math
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import SingleDeviceSharding

from fastslm_jax import audio, chips, cli, devices, sharding
from fastslm_jax import config as config_lib
from fastslm_jax.errors import UserError
from fastslm_jax.inference import batching, generator, load, long_form, programs
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.plan import published_configs
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints

FLAGS = flags.FLAGS
flags.DEFINE_list("minutes", ["1", "5", "15", "60", "240", "480", "1440"], "Lengths.")
flags.DEFINE_string("checkpoint", None, "Working directory of the model to measure.")
flags.DEFINE_list("compile", [], "Chips to compile the full-size model for: v6e, v5p, v5e.")
flags.DEFINE_enum(
    "kv_cache",
    None,
    ["float32", "bfloat16", "int8"],
    "Type of the key-value cache (default: the model's).",
)
flags.DEFINE_string("plot", None, "Draw memory and time by length here.")
flags.DEFINE_list("with", [], "JSON lists of earlier runs for the plot.")
flags.DEFINE_bool(
    "one",
    False,
    "Measure the single length in this process (what the benchmark calls itself with).",
)

NEW_TOKENS = 64
PROMPT_TOKENS = 32
TOPOLOGIES = {"v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v5e": "v5e:2x2"}  # the smallest of a chip


# -------------------------------------------------------------------------------------------------------------- measured


def recording(minutes: float) -> np.ndarray:
    """Swelling noise, int16 at 16 kHz."""
    second = np.random.default_rng(0).normal(0, 2000, audio.SAMPLE_RATE)
    second *= np.hanning(audio.SAMPLE_RATE)
    return np.resize(second.astype(np.int16), round(minutes * 60 * audio.SAMPLE_RATE))


def measure_one(minutes: float) -> dict:
    checkpoints = Checkpoints(FLAGS.checkpoint, read_only=True)
    step = load.find_step(checkpoints, FLAGS.checkpoint)
    generator = load.load(
        load.saved_config(checkpoints, FLAGS.checkpoint, step),
        checkpoints,
        step,
        cache_dtype=FLAGS.kv_cache,
        detect_repetition=False,
    )
    generator.native_positions = None  # memory and time do not ask what the model was trained for
    generator.answer([generator.Request(recording(0.2), "ssum")], [8])
    before_gib = devices.peak_memory_gib()
    samples, before, started = recording(minutes), devices.compiled_so_far(), time.time()
    generator.speech([samples])
    encoder_gib, encoded = (
        devices.peak_memory_gib(),
        time.time() - started - (devices.compiled_so_far() - before).seconds,
    )
    before, started = devices.compiled_so_far(), time.time()
    (answer,) = generator.answer([generator.Request(samples, "ssum")], [NEW_TOKENS])
    seconds = time.time() - started - (devices.compiled_so_far() - before).seconds
    return {
        "minutes": minutes,
        "peak_gib": devices.peak_memory_gib(),
        "seconds": round(seconds, 2),
        "device": devices.name(),
        "kind": "measured",
        "loaded_gib": before_gib,
        "encoder_gib": encoder_gib,
        "audio_gib": round(samples.nbytes / 2**30, 3),
        "encoder_seconds": round(encoded, 2),
        "windows": answer.windows,
        "speech_tokens": answer.speech_tokens,
        "covered_seconds": min(60 * minutes, answer.windows * generator.model.window.seconds),
        "rtfx": round(60 * minutes / seconds, 1),
    }


def measure() -> list[dict]:
    results = []
    for minutes in FLAGS.minutes:
        command = [
            sys.executable,
            __file__,
            "--one",
            f"--minutes={minutes}",
            f"--checkpoint={FLAGS.checkpoint}",
        ]
        command += [f"--kv_cache={FLAGS.kv_cache}"] if FLAGS.kv_cache else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{minutes} minutes: {done.stderr.strip().splitlines()[-1]}")
        results += json.loads(done.stdout.splitlines()[-1])
        show(results[-1])
    return results


# -------------------------------------------------------------------------------------------------------------- compiled


def full_size(device: jax.Device) -> FastSLM:
    """FastSLM-4B as the full-size configs build it for a device, computing in bfloat16."""
    config = config_lib.full_size()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whisper", "llm"):
            config.base[name] = published_configs.local(config.base[name], pathlib.Path(folder))
        return experiment.build(
            config, weights=False, mesh=sharding.make_mesh(devices=[device])
        ).model


def bytes_of(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Chip:
    """Compiles the programs of generation for one chip, and adds up what they need."""

    def __init__(self, name: str, cache_dtype):
        if name not in TOPOLOGIES:
            raise UserError(f"--compile={name}: is not one of {', '.join(TOPOLOGIES)}")
        topology = chips.parse_topology(TOPOLOGIES[name])
        jax.config.update(
            "jax_enable_compilation_cache", False
        )  # programs for absent devices cannot be read back
        device, self.facts = topology.devices()[0], topology.chip
        self.name, self.place, self.cache_dtype = (
            name,
            SingleDeviceSharding(device),
            jnp.dtype(cache_dtype),
        )
        self.model = full_size(device)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        self.params = jax.tree_util.tree_map_with_path(self._leaf, shapes)
        self.beside: dict[str, int] = {}

    def _leaf(self, path, leaf):
        is_ours = path[0].key == "hfq_former" or path[-1].key.startswith("lora_")
        return self.array(leaf.shape, jnp.float32 if is_ours else jnp.bfloat16)

    def array(self, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.place)

    def extra(self, lowered) -> float:
        """Bytes that a program takes beside its arguments that stay; infinite if the compiler finds no room for it."""
        try:
            memory = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    def encoder_extra(self) -> int:
        """Of the encoder's programs; they do not know how long a recording is."""
        if "encoder" not in self.beside:
            size, samples = generator.WINDOW_BATCH, self.model.window.samples + 2 * audio.CONTEXT
            windows, frames = self.array((size, samples), jnp.int16), self.array((size,), jnp.int32)
            highest = self.array((size,), jnp.float32)
            self.beside["encoder"] = max(
                self.extra(programs.window_maxima.lower(self.model, windows, frames, mesh=None)),
                self.extra(
                    programs.encode.lower(
                        self.model, self.params, windows, frames, frames, highest, mesh=None
                    )
                ),
            )
        return self.beside["encoder"]

    def compile(self, minutes: float) -> dict:
        started = time.time()
        windows = math.ceil(2 * minutes)
        positions = (
            windows * self.model.tokens_per_window
            + PROMPT_TOKENS
            + long_form.budget(60 * minutes, "ssum")
        )
        slots = generator.bucketed_length(positions)
        shapes = jax.eval_shape(lambda: self.model.llm.init_cache(1, slots, self.cache_dtype))
        cache = jax.tree.map(lambda leaf: self.array(leaf.shape, leaf.dtype), shapes)
        length, width = batching.LONG_CHUNK, self.model.llm.width
        whole = jax.tree.map(
            lambda leaf: self.array(np.shape(leaf), leaf.dtype), programs.Rows.idle(1)
        )
        chunk = [
            self.array((1, length), jnp.int32),
            self.array((1, length, width), jnp.bfloat16),
            self.array((1, length), bool),
        ]
        one = self.array((1,), jnp.int32)
        extras = {
            "encoder": self.encoder_extra(),
            "prefill": self.extra(programs.prefill.lower(self.model, self.params, cache, one, one, *chunk, mesh=None)),
            "decode": self.extra(
                programs.decode.lower(
                    self.model, self.params, cache, whole, None, generator.SamplingParams().controls(), 0, 64, 1, True,
                    greedy=True, mesh=None,
                )
            ),
        }  # fmt: skip
        params, stored = bytes_of(self.params), bytes_of(cache)
        gib = {name: value / 2**30 for name, value in extras.items()}
        peak = (params + stored) / 2**30 + max(gib.values())
        fits = peak <= self.facts.hbm_bytes / 2**30
        return {
            "minutes": minutes,
            "peak_gib": round(peak, 2) if fits else None,
            "peak_gb": round(peak * 1.073741824, 2) if fits else None,
            "seconds": round(self.least_seconds(windows, positions, stored), 1),
            "device": f"{self.name}, one chip of {self.facts.hbm_bytes / 2**30:.0f} GiB",
            "kind": "compiled",
            "kv_cache": self.cache_dtype.name,
            "fits": fits,
            "params_gib": round(params / 2**30, 2),
            "cache_gib": round(stored / 2**30, 2),
            "beside_gib": {name: round(value, 3) if fits else None for name, value in gib.items()},
            "slots": slots,
            "compile_seconds": round(time.time() - started, 1),
        }

    def least_seconds(self, windows: int, positions: int, cache_bytes: int) -> float:
        """What the chip's peak rates allow: products of encoder, HFQ-Former and prefill; reading weights and cache for each token
        of a summary of NEW_TOKENS."""
        encoder, llm = self.model.encoder, self.model.llm
        frames = encoder.max_positions
        block = 4 * encoder.width**2 + 2 * encoder.width * encoder.mlp_dim
        per_window = (
            2 * frames * encoder.num_layers * block
            + 4 * encoder.num_layers * frames**2 * encoder.width
        )
        heads = llm.num_heads * llm.head_dim
        layer = (
            2 * llm.width * heads
            + 2 * llm.width * llm.num_kv_heads * llm.head_dim
            + 3 * llm.width * llm.mlp_dim
        )
        prompt = windows * self.model.tokens_per_window
        prefill = 2 * prompt * llm.num_layers * layer + 2 * llm.num_layers * prompt**2 * heads
        read = NEW_TOKENS * (bytes_of(self.params["llm"]) + cache_bytes * prompt / positions)
        return (
            windows * per_window + prefill
        ) / self.facts.peak_flops + read / self.facts.hbm_bandwidth


# ----------------------------------------------------------------------------------------------------------------- shown


def show(result: dict) -> None:
    more = ""
    if result["kind"] == "compiled" and not result["fits"]:
        print(
            f"{result['minutes']:>7g} min  does not fit {result['device']}: parameters {result['params_gib']:.2f}, cache "
            f"{result['cache_gib']:.2f} GiB",
            flush=True,
        )
        return
    if result["kind"] == "compiled":
        beside = ", ".join(f"{name} {value:.2f}" for name, value in result["beside_gib"].items())
        more = f"parameters {result['params_gib']:.2f}, cache {result['cache_gib']:.2f}, beside them: {beside} GiB"
    else:
        more = f"encoder {result['encoder_gib']:.2f} GiB, {result['rtfx']:.0f} times real time"
    line = (
        f"{result['minutes']:>7g} min  {result['peak_gib']:>7.2f} GiB  {result['seconds']:>9.1f} s"
    )
    print(f"{line}  {result['device']}  {more}", flush=True)


def plot(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = sorted({(r["device"], r["kind"], r.get("kv_cache", "")) for r in results})
    for name in names:
        part = [r for r in results if (r["device"], r["kind"], r.get("kv_cache", "")) == name]
        label = ", ".join(value for value in name if value)
        for axis, field in zip(axes, ("peak_gib", "seconds"), strict=True):
            axis.plot(
                [r["minutes"] for r in part], [r[field] for r in part], marker="o", label=label
            )
    for axis, title in zip(
        axes, ("peak memory, GiB", "seconds (compiled: the least possible)"), strict=True
    ):
        axis.set(title=title, xlabel="minutes of audio", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(_):
    if FLAGS.one:
        print(json.dumps([measure_one(float(FLAGS.minutes[0]))]))
        return
    results = measure() if FLAGS.checkpoint else []
    for name in FLAGS.compile:
        chip = Chip(name, FLAGS.kv_cache or "bfloat16")
        for minutes in FLAGS.minutes:
            results.append(chip.compile(float(minutes)))
            show(results[-1])
    if FLAGS.plot:
        earlier = [
            entry
            for path in FLAGS["with"].value
            for entry in json.loads(pathlib.Path(path).read_text())
        ]
        plot([*earlier, *results], FLAGS.plot)
    print(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
