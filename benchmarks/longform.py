"""Memory and time by length of a recording that is processed in one context.

    python benchmarks/longform.py --checkpoint=assets/demo_model [--minutes=1,5,15,60,240,480,1440]
    python benchmarks/longform.py --compile=v6e,v5p [--kv_cache=bfloat16] [--minutes=…]

--checkpoint measures a model on this machine. Each length runs in a separate process on a synthetic
recording. The task is a summary of 64 tokens, so that the recording, not the answer, dominates.
Reports peak memory and time without compilation, in total and for the encoder alone.

--compile compiles the generation programs of FastSLM-4B in bfloat16 ahead of time for one TPU chip.
Peak memory is the parameters, the cache, and the largest temporary memory of a program. Seconds are
a lower bound from the chip's peak rates, not a measurement. The cache has room for the recording,
the prompt and the answer of a summary (`long_form.default_new_tokens`). Needs libtpu
(pip install -e .[tpu]).

Last line: a JSON list of {minutes, peak_gib, seconds, device, kind: measured | compiled, …}.
--plot=FILE.png draws it, together with the lists of earlier runs given by --with=FILE.json,…
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
if any(argument.startswith("--compile") for argument in sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import functools
import json
import math
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from banner import print_banner
from full_size_model import bytes_of, full_size
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from fastslm_jax import audio, chips, cli, devices
from fastslm_jax.errors import UserError
from fastslm_jax.inference import batching, generator, load, long_form, programs
from fastslm_jax.inference.capacity import bucketed_length
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.kv_cache import KVCache
from fastslm_jax.training.checkpoint import Checkpoints

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "minutes", ["1", "5", "15", "60", "240", "480", "1440"], "Lengths of the recording."
)
flags.DEFINE_string("checkpoint", None, "Working directory of the model to measure.")
flags.DEFINE_list("compile", [], "Chips to compile the full-size model for: v6e, v5p, v5e.")
flags.DEFINE_enum(
    "kv_cache",
    None,
    ["float32", "bfloat16", "int8"],
    "Type of the key-value cache (default: the model's).",
)
flags.DEFINE_string("plot", None, "File for a plot of memory and time by length.")
flags.DEFINE_list("with", [], "JSON lists of earlier runs to include in the plot.")
flags.DEFINE_bool("one", False, "Internal: measure the single length of --minutes in this process.")

NEW_TOKENS = 64
PROMPT_TOKENS = 32
# The smallest topology with each chip.
TOPOLOGIES = {"v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v5e": "v5e:2x2"}


# --------------------------------------------------------------------------------------- measured


def recording(minutes: float) -> np.ndarray:
    """Noise that swells once per second, int16 at 16 kHz."""
    second = np.random.default_rng(0).normal(0, 2000, audio.SAMPLE_RATE)
    second *= np.hanning(audio.SAMPLE_RATE)
    return np.resize(second.astype(np.int16), round(minutes * 60 * audio.SAMPLE_RATE))


def measure_one(minutes: float) -> dict:
    checkpoints = Checkpoints(FLAGS.checkpoint, read_only=True)
    step = load.find_step(checkpoints, FLAGS.checkpoint)
    loaded = load.load(
        load.saved_config(checkpoints, FLAGS.checkpoint, step),
        checkpoints,
        step,
        cache_dtype=FLAGS.kv_cache,
        detect_repetition=False,
    )
    # No context limit: quality does not matter here.
    loaded.capacity = dataclasses.replace(loaded.capacity, native_positions=None)
    loaded.answer([generator.Request(recording(0.2), "ssum", max_new_tokens=8)])
    before_gib = devices.peak_memory_gib()
    samples, before, started = recording(minutes), devices.compiled_so_far(), time.time()
    loaded.encode_speech([samples])
    encoder_gib = devices.peak_memory_gib()
    encoder_seconds = time.time() - started - (devices.compiled_so_far() - before).seconds
    before, started = devices.compiled_so_far(), time.time()
    request = generator.Request(samples, "ssum", max_new_tokens=NEW_TOKENS)
    (answer,) = loaded.answer([request])
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
        "encoder_seconds": round(encoder_seconds, 2),
        "windows": answer.windows,
        "speech_tokens": answer.speech_tokens,
        "covered_seconds": min(60 * minutes, answer.windows * loaded.model.window.seconds),
        "rtfx": round(60 * minutes / seconds, 1),
    }


def measure() -> list[dict]:
    results = []
    for minutes in FLAGS.minutes:
        command = [sys.executable, __file__, "--one", f"--minutes={minutes}"]
        command += [f"--checkpoint={FLAGS.checkpoint}"]
        command += [f"--kv_cache={FLAGS.kv_cache}"] if FLAGS.kv_cache else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{minutes} minutes: {done.stderr.strip().splitlines()[-1]}")
        results += json.loads(done.stdout.splitlines()[-1])
        show(results[-1])
    return results


# --------------------------------------------------------------------------------------- compiled


class Chip:
    """Compiles the generation programs for one chip and adds up their memory."""

    def __init__(self, name: str, cache_dtype: str) -> None:
        if name not in TOPOLOGIES:
            raise UserError(f"--compile={name}: choose from {', '.join(TOPOLOGIES)}")
        topology = chips.parse_topology(TOPOLOGIES[name])
        # Programs for absent devices cannot be loaded from the compilation cache.
        jax.config.update("jax_enable_compilation_cache", False)
        device, self.facts = topology.devices()[0], topology.chip
        self.name, self.cache_dtype = name, jnp.dtype(cache_dtype)
        self.sharding = SingleDeviceSharding(device)
        self.model = full_size(device)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        self.params = jax.tree_util.tree_map_with_path(self._leaf, shapes)

    def _leaf(self, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_ours = path[0].key == "hfq_former" or path[-1].key.startswith("lora_")
        return self.array(leaf.shape, jnp.float32 if is_ours else jnp.bfloat16)

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def extra(self, lowered: jax.stages.Lowered) -> float:
        """Bytes of a program beyond its arguments; infinite if it does not fit the chip."""
        try:
            memory = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    @functools.cached_property
    def encoder_extra(self) -> float:
        """Bytes of the encoder programs, which do not depend on the length of a recording."""
        size, samples = generator.WINDOW_BATCH, self.model.window.samples + 2 * audio.CONTEXT
        windows, frames = self.array((size, samples), jnp.int16), self.array((size,), jnp.int32)
        highest = self.array((size,), jnp.float32)
        maxima = programs.window_maxima.lower(self.model, windows, frames, mesh=None)
        encode = programs.encode.lower(
            self.model, self.params, windows, frames, frames, highest, mesh=None
        )
        return max(self.extra(maxima), self.extra(encode))

    def compile(self, minutes: float) -> dict:
        started = time.time()
        windows = math.ceil(2 * minutes)
        speech = windows * self.model.tokens_per_window
        positions = speech + PROMPT_TOKENS + long_form.default_new_tokens(60 * minutes, "ssum")
        slots = bucketed_length(positions)
        shapes = jax.eval_shape(lambda: self.model.llm.init_cache(1, slots, self.cache_dtype))
        cache = jax.tree.map(lambda leaf: self.array(leaf.shape, leaf.dtype), shapes)
        extras = {
            "encoder": self.encoder_extra,
            "prefill": self.extra(self.lower_prefill(cache)),
            "decode": self.extra(self.lower_decode(cache)),
        }
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

    def lower_prefill(self, cache: KVCache) -> jax.stages.Lowered:
        length, one = batching.LONG_CHUNK, self.array((1,), jnp.int32)
        tokens = self.array((1, length), jnp.int32)
        speech = self.array((1, length, self.model.llm.width), jnp.bfloat16)
        is_speech = self.array((1, length), bool)
        return programs.prefill.lower(
            self.model, self.params, cache, one, one, tokens, speech, is_speech, mesh=None
        )

    def lower_decode(self, cache: KVCache) -> jax.stages.Lowered:
        rows = jax.tree.map(
            lambda leaf: self.array(np.shape(leaf), leaf.dtype), programs.DecodeState.idle(1)
        )
        controls = SamplingParams().controls()
        end_ids, max_steps, enough, detect_repetition = np.zeros(1, np.int32), 64, 1, True
        return programs.decode.lower(
            self.model,
            self.params,
            cache,
            rows,
            None,
            controls,
            end_ids,
            max_steps,
            enough,
            detect_repetition,
            greedy=True,
            mesh=None,
        )

    def least_seconds(self, windows: int, positions: int, cache_bytes: int) -> float:
        """A lower bound from the chip's peak rates.

        Counts the matrix products of encoder and prefill, and reading the weights and the cache for
        each of NEW_TOKENS.
        """
        encoder, llm = self.model.encoder, self.model.llm
        frames = encoder.max_positions
        block = 4 * encoder.width**2 + 2 * encoder.width * encoder.mlp_dim
        scores = 4 * encoder.num_layers * frames**2 * encoder.width
        per_window = 2 * frames * encoder.num_layers * block + scores
        heads, kv_heads = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
        layer = 2 * llm.width * (heads + kv_heads) + 3 * llm.width * llm.mlp_dim
        prompt = windows * self.model.tokens_per_window
        prefill = 2 * prompt * llm.num_layers * layer + 2 * llm.num_layers * prompt**2 * heads
        read = NEW_TOKENS * (bytes_of(self.params["llm"]) + cache_bytes * prompt / positions)
        compute_seconds = (windows * per_window + prefill) / self.facts.peak_flops
        return compute_seconds + read / self.facts.hbm_bandwidth


# ----------------------------------------------------------------------------------------- output


def show(result: dict) -> None:
    line = f"{result['minutes']:>7g} min  "
    if result["kind"] == "measured":
        details = f"encoder {result['encoder_gib']:.2f} GiB, {result['rtfx']:.0f} times real time"
    else:
        details = f"parameters {result['params_gib']:.2f}, cache {result['cache_gib']:.2f} GiB"
        if not result["fits"]:
            print(f"{line}does not fit {result['device']}: {details}", flush=True)
            return
        beside = ", ".join(f"{name} {value:.2f}" for name, value in result["beside_gib"].items())
        details += f", temporary: {beside} GiB"
    line += f"{result['peak_gib']:>7.2f} GiB  {result['seconds']:>9.1f} s"
    print(f"{line}  {result['device']}  {details}", flush=True)


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
        axes, ("peak memory, GiB", "seconds (compiled: lower bound)"), strict=True
    ):
        axis.set(title=title, xlabel="minutes of audio", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(_: list[str]) -> None:
    if FLAGS.one:
        print(json.dumps([measure_one(float(FLAGS.minutes[0]))]))
        return
    print_banner("Peak memory and time of recordings of different lengths.")
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
            for entry in json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        ]
        plot([*earlier, *results], FLAGS.plot)
    print(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
