"""Attention of the HFQ-Former: which frames its queries and speech tokens read.

    python -m fastslm_jax.attention_maps FILE --checkpoint=WORKDIR --out=maps.npz
    python -m fastslm_jax.attention_maps FILE --checkpoint=WORKDIR --out=maps.png [--window=2]
        [--labels=WORDS.txt | --text=TRANSCRIPT]

An .npz file has the maps of all windows of the recording. A .png file shows one window:
the log-mel spectrogram, what each compressor reads, and what each token reads in detail recovery.
Words come from --labels (an Audacity label track: start, end and word, separated by tabs), from
--text, or by default from the model's own transcript, whose times are those of its segments.
docs/attention_maps.md explains the arrays and shows a picture.
"""

from absl import flags

from fastslm_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Working directory of a trained or imported model.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint (default: the newest).")
    flags.DEFINE_list("out", None, "Files to write, .png or .npz.")
    flags.DEFINE_integer("window", 1, "The window that a picture shows, from 1.", lower_bound=1)
    flags.DEFINE_string("labels", None, "An Audacity label track with the words of the recording.")
    flags.DEFINE_string("text", None, "The transcript of the recording, if its times are unknown.")


if __name__ == "__main__":
    define_flags()
    cli.parse_flags(required=("checkpoint", "out"))  # before the imports below, which take seconds

import dataclasses
import functools
import itertools
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from fastslm_jax import audio, outputs
from fastslm_jax.errors import UserError
from fastslm_jax.inference import api
from fastslm_jax.models import log_mel
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.fastslm import FastSLM

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

BATCH = 4  # windows
_LINE = 150  # characters that fit the width of a picture
Words = Sequence[tuple[float, float, str]]  # (start, end, text) in seconds


def maps(model: FastSLM, params: dict, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Attention maps of all windows of a recording, averaged over the heads.

    The queries and keys are those of the model's own forward pass (`Module.sow`).

    Args:
        samples: int16 at 16 kHz.

    Returns:
        log_mel [windows, frames of 10 ms, mels].
        window_seconds [windows]: where each window starts.
        compressor_K [windows, queries, frames of level K], K from 1: sums to 1 over the frames.
        semantic_distillation [windows, tokens, queries of all levels]: sums to 1 over the queries.
        detail_recovery_L [windows, tokens, frames of all levels], layer L from 0: sums to 1 over
            the frames.
        frame_seconds, frame_level [frames of all levels]: start of each frame in its window, and
            its level.
        distillation_mass [windows, tokens, levels], detail_recovery_mass_L: the same, summed over
            each level.
        tokens [windows, tokens, llm width]: the speech tokens.

    Raises:
        UserError: the model has another adapter than the HFQ-Former.
    """
    adapter, spec = model.adapter, model.window
    if not isinstance(adapter, HFQFormer):
        raise UserError(
            f"attention maps need config.model.adapter=hfq; this model has {type(adapter).__name__}"
        )
    windows, frames = spec.cut(samples)
    recording = np.zeros((1, len(windows)), np.int32)
    spectrogram = jax.jit(log_mel.log_mel, static_argnums=3)
    mel = spectrogram(windows[None], frames[None], recording, model.encoder.num_mels)[0]
    parts = []
    for start in range(0, len(mel), BATCH):
        part = mel[start : start + BATCH]
        padded = jnp.pad(part, ((0, BATCH - len(part)), (0, 0), (0, 0)))  # one compiled program
        found = jax.device_get(_forward(model, params, padded))
        parts.append({name: array[: len(part)] for name, array in found.items()})
    result = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    levels = [result[name].shape[-1] for name in compressors(result)]
    seconds = spec.seconds / levels[0] * adapter.downsample_factor ** np.arange(len(levels))
    result["log_mel"] = np.asarray(mel)
    result["window_seconds"] = spec.seconds * np.arange(len(mel))
    result["frame_level"] = np.repeat(np.arange(1, len(levels) + 1), levels)
    result["frame_seconds"] = np.concatenate(
        [step * np.arange(count) for step, count in zip(seconds, levels, strict=True)]
    )
    queries = np.repeat(np.arange(1, len(levels) + 1), adapter.stage_tokens)
    result["distillation_mass"] = _by_level(result["semantic_distillation"], queries)
    for layer in range(adapter.detail_recovery_layers):
        recovered = result[f"detail_recovery_{layer}"]
        result[f"detail_recovery_mass_{layer}"] = _by_level(recovered, result["frame_level"])
    return result


def compressors(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the compressors' maps, by level."""
    return sorted(name for name in arrays if name.startswith("compressor_"))


def _by_level(attention: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Attention [..., keys] and the level of each key → [..., levels]."""
    return np.stack([attention[..., level == k].sum(axis=-1) for k in np.unique(level)], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: FastSLM, params: dict, mel: jax.Array) -> dict[str, jax.Array]:
    """Log-mel [windows, frames, mels] → the model's speech tokens and attention maps."""
    features = model.encoder.apply({"params": params["encoder"]}, mel)
    adapter = {"params": params[model.adapter.GROUP]}
    tokens, state = model.adapter.apply(adapter, features, mutable="attention")
    found = {
        name: _probabilities(*sown.get("cross_attention", sown)["query_key"][0])
        for name, sown in state["attention"].items()
    }
    return {"tokens": tokens, **found}


def _probabilities(query: jax.Array, key: jax.Array) -> jax.Array:
    """Query [b, t, n, h] and key [b, s, n, h] → mean over the heads [b, t, s]."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1).mean(axis=1)


# ----------------------------------------------------------------------------------------- words


def read_labels(path: str) -> list[tuple[float, float, str]]:
    """An Audacity label track: a line per word, START<tab>END<tab>WORD, in seconds.

    Raises:
        UserError: there is no such file, or a line has another form.
    """
    found = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("\\"):  # frequencies of the label before
            continue
        try:
            start, end, word = line.split("\t", 2)
            found.append((float(start), float(end), word.strip()))
        except ValueError:
            raise UserError(
                f"--labels={path}: line {number} is {line[:60]!r}; write the start and end in "
                "seconds and a word, separated by tabs"
            ) from None
    return found


# --------------------------------------------------------------------------------------- picture


@dataclasses.dataclass(frozen=True)
class _Span:
    """The time axis of a picture, in seconds of the recording."""

    start: float
    stop: float

    def show(self, axes: plt.Axes, rows: np.ndarray, **options: object) -> None:
        """Draws [rows, time], the first row at the bottom."""
        extent = (self.start, self.stop, -0.5, len(rows) - 0.5)
        options |= {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        axes.imshow(rows, extent=extent, **options)


def picture(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], window: int, words: Words, seconds: float
) -> None:
    """Draws a window.

    Args:
        arrays: of `maps`.
        window: its index, from 0.
        seconds: length of the recording; the rest of the last window is padding.
    """
    names = compressors(arrays)
    layers = sorted(name for name in arrays if name.startswith("detail_recovery_mass_"))
    start = float(arrays["window_seconds"][window])
    frames = arrays["log_mel"].shape[1]
    span = _Span(start, start + frames * audio.HOP / audio.SAMPLE_RATE)
    figure, grid = plt.subplots(
        1 + len(names) + len(layers),
        2,
        figsize=(11, 2 + 1.7 * (len(names) + len(layers))),
        width_ratios=(5, 1),
        constrained_layout=True,
        squeeze=False,
    )
    rows = iter(grid)
    spectrogram, side = next(rows)
    side.axis("off")
    side.text(0, 0.5, "cyan: end of\nthe recording", va="center", fontsize=9)
    span.show(spectrogram, arrays["log_mel"][window].T, cmap="magma")
    spectrogram.set(ylabel="mel band")
    _write_words(spectrogram, words, span)

    distilled = arrays["semantic_distillation"][window].mean(axis=0)
    share = arrays["distillation_mass"][window].mean(axis=0)
    level_seconds = [
        np.diff(arrays["frame_seconds"][arrays["frame_level"] == k + 1][:2])[0]
        for k in range(len(names))
    ]
    ends = np.cumsum([arrays[name].shape[1] for name in names])
    for k, (axes, side) in enumerate(itertools.islice(rows, len(names))):
        attention = arrays[names[k]][window]
        _show_attention(span, axes, attention)
        milliseconds = 1000 * level_seconds[k]
        axes.set(ylabel="query")
        axes.set_title(f"compressor {k + 1}, frames of {milliseconds:.0f} ms", fontsize=9)
        queries = distilled[ends[k] - len(attention) : ends[k]]
        side.barh(np.arange(len(attention)), queries, height=1.0, color=f"C{k}")
        side.set_xlim(0, 1.05 * distilled.max())
        side.set_title(f"distillation reads {100 * share[k]:.0f} %", fontsize=9)
        _set_rows(side, len(attention))

    for mass_name, (axes, side) in zip(layers, rows, strict=True):
        name = mass_name.replace("_mass", "")
        fine = on_finest_level(arrays[name][window], arrays["frame_level"])
        _show_attention(span, axes, fine)
        axes.set(ylabel="token")
        axes.set_title(f"detail recovery, layer {int(name[-1]) + 1}, all levels", fontsize=9)
        mass, left = arrays[mass_name][window], 0.0
        for k in range(len(names)):
            side.barh(np.arange(len(mass)), mass[:, k], 1.0, left, color=f"C{k}")
            left = left + mass[:, k]
        shares = ", ".join(f"{100 * part:.0f}" for part in mass.mean(axis=0))
        side.set_title(f"by level: {shares} %", fontsize=9)
        side.set_xlim(0, 1)
        _set_rows(side, len(mass))
    for axes in grid[:, 0]:
        axes.tick_params(labelbottom=axes is grid[-1, 0])
        axes.axvline(seconds, color="cyan", linewidth=1)  # padding follows
        axes.set_xlim(span.start, span.stop)
    grid[-1, 0].set_xlabel("seconds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def on_finest_level(attention: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Attention to frames of all levels [..., frames] → on the frames of level 1, the same sum.

    A frame of a coarser level divides its mass equally among the frames it covers; those beyond
    the window's end add theirs to the last one.
    """
    finest = attention[..., level == 1]
    length, total = finest.shape[-1], finest.copy()
    for k in np.unique(level)[1:]:
        coarse = attention[..., level == k]
        factor = -(-length // coarse.shape[-1])
        spread = np.repeat(coarse / factor, factor, axis=-1)
        total += spread[..., :length]
        total[..., -1] += spread[..., length:].sum(axis=-1)
    return total


def _show_attention(span: _Span, axes: plt.Axes, attention: np.ndarray) -> None:
    """Rows are clipped at their 99.5th percentile, so that one peak does not hide the rest."""
    span.show(axes, attention, cmap="viridis", vmin=0, vmax=np.percentile(attention, 99.5))
    _set_rows(axes, len(attention))


def _set_rows(axes: plt.Axes, count: int) -> None:
    axes.set_ylim(-0.5, count - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _write_words(axes: plt.Axes, words: Words, span: _Span) -> None:
    top = axes.get_ylim()[1]
    for start, end, text in words:
        low, high = max(start, span.start), min(end, span.stop)
        if low < high:
            axes.axvline(low, color="white", linewidth=0.5)
            place = {"ha": "center", "va": "bottom", "rotation": 0 if " " in text else 45}
            width = max(12, round(_LINE * (high - low) / (span.stop - span.start)))
            axes.text((low + high) / 2, top, textwrap.fill(text, width), fontsize=7, **place)


# ------------------------------------------------------------------------------------------ main


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise UserError(
            "give one audio file: python -m fastslm_jax.attention_maps FILE --checkpoint=WORKDIR "
            "--out=maps.png"
        )
    out = {path.suffix: path for path in map(pathlib.Path, FLAGS.out)}
    if len(out) < len(FLAGS.out) or not out.keys() <= {".png", ".npz"}:
        raise UserError(f"--out={','.join(FLAGS.out)}: give one .png file, one .npz file, or both")
    for path in out.values():
        outputs.check_file(path, "--out")
    if FLAGS.labels is not None and FLAGS.text is not None:
        raise UserError("--labels and --text: give one of them")
    words = read_labels(FLAGS.labels) if FLAGS.labels is not None else None
    samples = audio.read_audio(argv[1])
    seconds = len(samples) / audio.SAMPLE_RATE
    model = api.load(FLAGS.checkpoint, FLAGS.step)
    generator = model.generator
    fastslm = generator.encode_speech.model
    count = fastslm.window.count(len(samples))
    if FLAGS.window > count:
        raise UserError(f"--window={FLAGS.window}: the recording has {count}")
    arrays = maps(fastslm, generator.params, samples)
    if ".npz" in out:
        np.savez_compressed(out[".npz"], **arrays)
        print(f"{out['.npz']}: {count} windows")
    if ".png" in out:
        if FLAGS.text is not None:
            words = [(0.0, seconds, FLAGS.text)]
        elif words is None:
            segments = model.transcribe(samples).segments
            words = [(segment.start, segment.end, segment.text) for segment in segments]
        picture(out[".png"], arrays, FLAGS.window - 1, words, seconds)
        print(f"{out['.png']}: window {FLAGS.window} of {count}")


if __name__ == "__main__":
    cli.run(main)
