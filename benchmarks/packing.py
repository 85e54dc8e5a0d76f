"""Fill of packed rows and time of the packing plan, for several length distributions.

    python benchmarks/packing.py [--examples=20000] [--million=1000000]

utterances   as in LibriSpeech: 1.5 to 24.5 s, mean 12.3 s; rows of 32 windows
longform     the same, joined into 1 to 15 minutes, as in stage 2; rows of 60 windows (30 minutes)
mix          half utterances of four tasks (asr, ast, ssum, sqqa) in equal parts, half joined
             recordings; rows of 30 windows
longform_30  as longform, in rows of 30 windows: a recording of 14 minutes then leaves room for
             only one of one minute

`window_fill` and `token_fill` are the fraction of filled slots in packed rows. `padded_…` is the
same for batches of 16 random examples, padded to the longest in the batch. Rows have as many token
slots as `packing.suggest` proposes for the distribution. Time is CPU time of the whole plan from an
index in memory (order, sizes, packing) on one core; the slowest distribution counts.
Last line: one JSON object.
"""

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from banner import print_banner

from fastslm_jax.audio import SAMPLE_RATE, WindowSpec
from fastslm_jax.data import longform, packing
from fastslm_jax.data.manifest import Utterance

PROMPT, SPEECH = 22, 50  # tokens of a prompt, and of a window
WINDOW, BATCH = WindowSpec(), 16
ROW_WINDOWS = {"utterances": 32, "longform": 60, "mix": 30, "longform_30": 30}
COLUMNS = ("window_fill", "token_fill", "padded_window_fill", "padded_token_fill", "row_tokens")


def utterances(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples and text tokens of clips, at 2.7 words per second and 1.35 tokens per word.

    Most are 12 to 17 s long, the others shorter.
    """
    is_long, long = rng.random(count) < 0.7, rng.normal(14.4, 1.6, count)
    seconds = np.where(is_long, long, rng.uniform(1.5, 13.0, count)).clip(1.5, 24.5)
    tokens = seconds * rng.normal(2.7, 0.4, count).clip(1.2, 4.5) * 1.35
    return np.round(seconds * SAMPLE_RATE).astype(np.int64), np.round(tokens).astype(np.int64) + 1


def answers(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Answer tokens from text tokens, for asr, ast, ssum and sqqa in equal parts."""
    task, count = rng.integers(4, size=len(tokens)), len(tokens)
    translated, summary = np.round(1.3 * tokens).astype(np.int64), rng.integers(25, 90, count)
    short_answer = rng.integers(2, 20, count)
    lengths = [tokens, translated, np.minimum(summary, tokens), np.minimum(short_answer, tokens)]
    return np.choose(task, lengths)


def sizes_of(samples: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Windows, tokens and labels of examples: [examples, 3]."""
    windows = WINDOW.count(samples)
    return np.stack([windows, PROMPT - 1 + windows * SPEECH + text + 1, text + 1], axis=1)


def joined(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples and text tokens of recordings of 1 to 15 minutes, from the long-form plan."""
    samples, text = utterances(50 * count, rng)
    # The plan reads durations only, so all other fields may be empty.
    index = [
        Utterance("", 0.0, clip / SAMPLE_RATE, "asr", None, "", "", "en", "", "", "")
        for clip in samples.tolist()
    ]
    examples = longform.joined_examples(0, index, longform.LongForm(60.0, 900.0), rng)[:count]
    clips = [list(example.clips) for example in examples]
    lengths = [
        samples[clip].sum() + sum(example.gaps)
        for clip, example in zip(clips, examples, strict=True)
    ]
    return np.array(lengths), np.array([text[clip].sum() for clip in clips])


def draw(name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes [count, 3] from a distribution."""
    if name == "utterances":
        return sizes_of(*utterances(count, rng))
    if name.startswith("longform"):
        return sizes_of(*joined(count, rng))
    samples, text = utterances(count - count // 2, rng)
    short = sizes_of(samples, answers(text, rng))
    sizes = np.concatenate([short, sizes_of(*joined(count // 2, rng))])
    return sizes[rng.permutation(len(sizes))]


def fills(sizes: np.ndarray, shape: packing.RowShape) -> dict[str, float]:
    rows = packing.pack(sizes, shape)
    windows, tokens = sizes[:, 0].sum(), sizes[:, 1].sum()
    batches = [sizes[start : start + BATCH] for start in range(0, len(sizes), BATCH)]
    return {
        "window_fill": windows / (len(rows) * shape.windows),
        "token_fill": tokens / (len(rows) * shape.tokens),
        "padded_window_fill": windows / sum(len(batch) * batch[:, 0].max() for batch in batches),
        "padded_token_fill": tokens / sum(len(batch) * batch[:, 1].max() for batch in batches),
        "row_tokens": shape.tokens,
        "examples_per_row": len(sizes) / len(rows),
    }


def plan_seconds(
    drawn: np.ndarray, shape: packing.RowShape, count: int, rng: np.random.Generator
) -> float:
    """CPU seconds to plan an epoch of `count` examples whose sizes are sampled from `drawn`."""
    lengths = drawn[rng.integers(len(drawn), size=count)]
    started = time.process_time()
    examples = longform.single_examples(0, count, rng)
    examples = [examples[i] for i in rng.permutation(count).tolist()]
    clips = np.array([example.clips[0] for example in examples])
    rows = packing.pack(lengths[clips], shape)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--examples", type=int, default=20_000, help="per distribution, to measure the fill"
    )
    parser.add_argument(
        "--million", type=int, default=1_000_000, help="examples to plan, to measure the time"
    )
    options = parser.parse_args()
    print_banner("Packed rows against padded batches.", "cpu")
    result, seconds = {}, []
    header = (*COLUMNS, "plan s / million")
    print(f"{'':12}{''.join(f'{name:>20}' for name in header)}", flush=True)
    for name, row_windows in ROW_WINDOWS.items():
        rng = np.random.default_rng(0)
        sizes = draw(name, options.examples, rng)
        shape = packing.suggest(sizes, row_windows)
        found = fills(sizes, shape)
        seconds.append(plan_seconds(sizes, shape, options.million, rng) * 1e6 / options.million)
        cells = "".join(f"{found[column]:20.4g}" for column in COLUMNS)
        print(f"{name:12}{cells}{seconds[-1]:20.2f}", flush=True)
        result[name] = {key: round(float(value), 4) for key, value in found.items()}
    print(json.dumps(result | {"plan_seconds_per_million": round(max(seconds), 2)}))


if __name__ == "__main__":
    main()
