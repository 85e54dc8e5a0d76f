"""What the paper and its reviews claim or ask to be checked, one by one, with a verdict.

    python benchmarks/paper_claims.py --demo=runs/demo [--results=FILE.jsonl,…]
        [--out=docs/paper_claims.md]

Sizes and costs of FastSLM-4B are computed from its shapes, without weights. --checkpoint encodes
five minutes of synthetic speech with a real model. Losses are those of a finished demo (--demo).
Scores are read from the result files of `python -m fastslm_jax.ablate`; what they lack is
"not run". Writes a Markdown page. Last line: one JSON object.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from banner import print_banner
from full_size_model import full_size
from token_rate_costs import MINUTES, costs, shapes_of

from fastslm_jax import cli, outputs
from fastslm_jax.audio import CONTEXT, SAMPLE_RATE
from fastslm_jax.demo import voices
from fastslm_jax.demo.examples import draw_example
from fastslm_jax.errors import UserError
from fastslm_jax.inference import api
from fastslm_jax.models.fastslm import FastSLM

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", "assets/demo_model", "The model that encodes real audio.")
    flags.DEFINE_string("demo", "runs/demo", "Folder of a finished `make demo`, for the losses.")
    flags.DEFINE_list("results", [], "results.jsonl files of `python -m fastslm_jax.ablate`.")
    flags.DEFINE_string("out", "docs/paper_claims.md", "The page to write.")


WITHOUT = ", no detail recovery"  # end of the names of variants
NOT_RUN = "not run"
Results = Sequence[dict]


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of the page. `source`: a part of the reviews, or the paper's abstract."""

    source: str
    claim: str
    verdict: str
    figure: str


# ----------------------------------------------------------------------------------------- shapes


def speech_shape(model: FastSLM, minutes: float) -> tuple[int, ...]:
    """Shape of the speech tokens of a recording, from the model's own code."""
    count = model.window.count(round(60 * minutes * SAMPLE_RATE))
    windows = jax.ShapeDtypeStruct((1, count, model.window.samples + 2 * CONTEXT), jnp.int16)
    numbers = jax.ShapeDtypeStruct((1, count), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(model.speech_tokens, params, windows, numbers, numbers).shape[1:]


def stage_shapes(model: FastSLM) -> dict[str, tuple[int, ...]]:
    """Shapes [tokens, width] of what the HFQ-Former sows, and {query, keys} of its recovery."""
    size = (1, model.encoder.max_positions, model.encoder.width)
    features = jax.ShapeDtypeStruct(size, jnp.bfloat16)
    params = shapes_of(model.adapter, features)
    collections = ["intermediates", "attention"]
    _, sown = jax.eval_shape(
        lambda params, x: model.adapter.apply(params, x, mutable=collections), params, features
    )
    found = {name: value[0].shape[1:] for name, value in sown["intermediates"].items()}
    recovery = sown["attention"]["detail_recovery_0"]["cross_attention"]["query_key"][0]
    return found | {f"recovery {name}": x.shape[1:] for name, x in zip("qk", recovery, strict=True)}


def shape_checks(model: FastSLM, checkpoint: str) -> list[Check]:
    tokens, width = speech_shape(model, minutes=5)
    measured = encoded_tokens(checkpoint, minutes=5)
    rate = tokens / 300
    stages = stage_shapes(model)
    pattern = [stages[f"stage{k}_tokens"][0] for k in (1, 2, 3)] + [stages["semantic_tokens"][0]]
    heads, head_dim = stages["recovery q"][1:]
    fewer = {frames: 100 * (1 - rate / frames) for frames in (25, 50)}
    return [
        Check(
            "First experiments 1",
            "synthetic audio of 5 minutes gives 500 tokens",
            _holds(tokens == measured == 500),
            f"{tokens} tokens (FastSLM-4B, from shapes); {measured} (demo model, run)",
        ),
        Check(
            "First experiments 3",
            "cross-attention of the HFQ-Former fits Qwen3-4B",
            _holds(width == model.llm.width and heads * head_dim == model.encoder.width),
            f"{stages['recovery q'][0]} queries read {stages['recovery k'][0]:,} frames, "
            f"{heads} heads of {head_dim}; width {heads * head_dim} → {width}",
        ),
        Check(
            "Quick checks 1",
            "80 → 80 → 80 → 50 tokens",
            _holds(pattern == [80, 80, 80, 50]),
            " → ".join(map(str, pattern)),
        ),
        Check(
            "Quick checks 2",
            "speech tokens are as wide as Qwen3-4B's embeddings",
            _holds(width == model.llm.width),
            f"{width} and {model.llm.width}",
        ),
        Check(
            "Abstract",
            "93 % fewer tokens than standard frame-level adapters (25 per second)",
            _holds(round(fewer[25]) == 93),
            f"{rate:.2f} per second: {fewer[25]:.1f} % fewer",
        ),
        Check(
            "News summary",
            "97 % fewer tokens (than the encoder's 50 frames per second)",
            _holds(round(fewer[50]) == 97),
            f"{fewer[50]:.1f} % fewer",
        ),
        Check(
            "Review, key results",
            "93 % fewer tokens than 50 per second",
            _holds(round(fewer[50]) == 93),
            f"{fewer[50]:.1f} %; 93 % is relative to 25 per second",
        ),
    ]


def encoded_tokens(checkpoint: str, minutes: float) -> int:
    """Speech tokens of synthetic speech of this length, by a real model."""
    rng, voice, parts = random.Random(0), voices.voices()[0][0], []
    length = round(60 * minutes * SAMPLE_RATE)
    while sum(map(len, parts)) < length:
        parts += [voices.speak(draw_example("asr", rng, "test").text, voice)[0], np.zeros(5000)]
    samples = np.round(16_000 * np.concatenate(parts)[:length]).astype(np.int16)
    (tokens,) = api.load(checkpoint).generator.encode_speech([samples])
    return len(tokens)


def _holds(is_true: bool) -> str:
    return "holds" if is_true else "does not hold"


# ------------------------------------------------------------------------------------- training


def loss_check(demo: pathlib.Path) -> Check:
    """The training loss of each stage of a demo, as means over its quarters."""
    source, claim = "Quick checks 3", "the training loss falls in all three stages"
    files = [demo / f"stage{number}/metrics.jsonl" for number in (1, 2, 3)]
    if not all(file.exists() for file in files):
        return Check(source, claim, NOT_RUN, "")
    texts, falls = [], []
    for file in files:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        losses = np.array([line["loss"] for line in lines if "loss" in line])
        quarters = [part.mean() for part in np.array_split(losses, 4)]
        falls.append(bool(np.all(np.diff(quarters) < 0)))
        texts.append(" → ".join(f"{loss:.2f}" for loss in quarters))
    figure = "; ".join(f"stage {k}: {text}" for k, text in enumerate(texts, 1))
    return Check(source, claim, _holds(all(falls)), f"{figure} (means of quarters)")


# ------------------------------------------------------------------------------------ experiments


def read_results(paths: Iterable[str]) -> list[dict]:
    """The lines of result files. Raises UserError if one is not a result."""
    found = []
    for path in paths:
        for number, line in enumerate(pathlib.Path(path).read_text("utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found.append(record | {key: record[key] for key in ("suite", "variant", "scores")})
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"--results={path}: line {number} is not a result of "
                    "python -m fastslm_jax.ablate (an object with suite, variant and scores)"
                ) from None
    return found


def wers(results: Results, suite: str, minutes: int | None = None) -> dict[str, list[float]]:
    """{variant: WER in % of each seed}, on the set "test", or on recordings of some minutes."""
    found: dict[str, list[float]] = {}
    for record in results:
        if record["suite"] != suite:
            continue
        if minutes is None:
            wer = record["scores"].get("test", {}).get("wer")
        else:
            wer = record.get("wer_by_minutes", {}).get(f"{minutes:g}")
        if wer is not None:
            found.setdefault(record["variant"], []).append(wer)
    return found


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation} %"


def compare(first: Sequence[float], second: Sequence[float]) -> str:
    """ "lower", "higher" or "equal within the spread": the first against the second.

    They differ if their means are further apart than the sum of their standard deviations.
    """
    if min(len(first), len(second)) < 2:
        return "one seed only"
    difference = np.mean(first) - np.mean(second)
    if abs(difference) <= np.std(first, ddof=1) + np.std(second, ddof=1):
        return "equal within the spread"
    return "lower" if difference < 0 else "higher"


def _listed(found: dict[str, list[float]]) -> str:
    return "; ".join(f"{name}: {spread(values)}" for name, values in found.items())


def experiment_checks(results: Results) -> list[Check]:
    return [
        _recovery_check("First experiments 2, next checks 1", results),
        _tokens_check("Next checks 2", results),
        _grouping_check("Next checks 3", results),
    ]


def _recovery_check(source: str, results: Results) -> Check:
    claim = "WER on recordings of 10 minutes with and without detail recovery"
    found = wers(results, "stages", 10) | wers(results, "grouping", 10)
    pairs = {
        name: (found[name], found[name + WITHOUT]) for name in found if name + WITHOUT in found
    }
    if not pairs:
        return Check(source, claim, NOT_RUN, "")
    verdicts = {name: f"with: {compare(*pair)}" for name, pair in pairs.items()}
    texts = [f"{name}: {spread(a)} with, {spread(b)} without" for name, (a, b) in pairs.items()]
    return Check(source, claim, _joined(verdicts), "; ".join(texts))


def _joined(verdicts: dict[str, str]) -> str:
    """One verdict if all agree, otherwise each with its name."""
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    return "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())


def _tokens_check(source: str, results: Results) -> Check:
    claim = "WER with 25, 50, 100 and 200 tokens per window of 30 s"
    found = wers(results, "tokens")
    if not {"25", "50", "100", "200"} <= found.keys():
        return Check(source, claim, NOT_RUN, _listed(found))
    verdicts = [f"{n} against 50: {compare(found[n], found['50'])}" for n in ("25", "100", "200")]
    return Check(source, claim, "; ".join(verdicts), _listed(found))


def _grouping_check(source: str, results: Results) -> Check:
    claim = "WER after joining clips at random and by topic (semantic)"
    found = wers(results, "grouping", 10) or wers(results, "grouping")
    if not {"random", "semantic"} <= found.keys():
        return Check(source, claim, NOT_RUN, _listed(found))
    verdict = f"semantic against random: {compare(found['semantic'], found['random'])}"
    return Check(source, claim, verdict, _listed(found))


# ------------------------------------------------------------------------------------------ costs


def cost_check(found: Sequence[dict]) -> Check:
    """FLOPs and cache of the longest recording, at 1.67 and at 25 tokens per second."""
    longest = {cost["rate"]: cost for cost in found if cost["minutes"] == max(MINUTES)}
    ours, standard = longest[1.67], longest[25]
    total, other = ((cost["flops"] + cost["adapter_flops"]) / 1e12 for cost in (ours, standard))
    return Check(
        "Abstract",
        "fewer FLOPs and less memory for long recordings than at 25 tokens per second",
        _holds(total < other and ours["cache_gib"] < standard["cache_gib"]),
        f"60 minutes, adapter and decoder: {number(total)} and {number(other)} TFLOP; "
        f"cache {ours['cache_gib']:.1f} and {standard['cache_gib']:.1f} GiB",
    )


def number(value: float) -> str:
    """Three digits: 0.0687, 4.12, 3,050."""
    return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


# ------------------------------------------------------------------------------------------- page


def page(checks: Sequence[Check], found: Sequence[dict], results: Sequence[str]) -> str:
    """The Markdown page. `results`: the result files, for the command."""
    lines = ["| where | claim or question | verdict | figure |", "|---|---|---|---|"]
    lines += [f"| {c.source} | {c.claim} | {c.verdict} | {c.figure} |" for c in checks]
    adapters = ["| tokens/s | adapter | parameters, M | GFLOP per window | memory, GiB |"]
    adapters += ["|---|---|---|---|---|"]
    header = [f"{minutes:g} min" for minutes in MINUTES]
    tables: dict[str, list[str]] = {
        title: [f"| tokens/s | {' | '.join(header)} |", "|---" * (1 + len(header)) + "|"]
        for title in ("TFLOP of the adapter", "TFLOP of the decoder", "Key-value cache, GiB")
    }
    for rate in dict.fromkeys(cost["rate"] for cost in found):
        row = [cost for cost in found if cost["rate"] == rate]
        first = row[0]
        adapters.append(
            f"| {rate:g} | {first['adapter']} | {first['parameters'] / 1e6:.0f} | "
            f"{first['window_flops'] / 1e9:.0f} | {first['memory_gib']:.2f} |"
        )
        columns = (
            [cost["adapter_flops"] / 1e12 for cost in row],
            [cost["flops"] / 1e12 for cost in row],
            [cost["cache_gib"] for cost in row],
        )
        for table, values in zip(tables.values(), columns, strict=True):
            table.append(f"| {rate:g} | {' | '.join(map(number, values))} |")
    command = "python benchmarks/paper_claims.py --demo=runs/demo"
    command += f" \\\n    --results={','.join(results)}" if results else ""
    parts = [
        "# Claims of the paper, checked",
        f"Made by\n\n```sh\n{command}\n```",
        INTRODUCTION,
        "\n".join(lines),
        "## Costs by token rate",
        COSTS,
        "\n".join(adapters),
    ]
    for title, table in tables.items():
        parts += [f"{title}, by length of the recording:", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
The claims and questions are those of the paper's abstract and of three public texts about it: a
summary and a review with "First experiments", "Quick checks" and "Next checks". Sizes are those of
FastSLM-4B, from the shapes that its code computes. Scores are those of the small experiments, on
synthetic speech; mean ± standard deviation over the seeds. Variants whose means are no further
apart than the sum of their deviations count as equal. "Not run": no result file has it."""

COSTS = """\
FastSLM-4B in bfloat16, forward pass of the speech tokens of one recording. 1.67 tokens per second
are the HFQ-Former's; the other rates are stacks of 4, 2 and 1 encoder frames, each followed by an
MLP with about as many parameters as the HFQ-Former. FLOPs of the adapter are counted in the traced
program; those of the decoder are the minimum of [performance.md](performance.md). The memory of the
adapter is that of its program for 10 minutes in one batch, compiled for a CPU (temporary arrays and
result). Nothing was run at this size."""


def main(_: Sequence[str]) -> None:
    out = outputs.check_file(FLAGS.out, "--out")
    results = read_results(FLAGS.results)
    print_banner("Claims of the paper against this implementation.", "cpu")
    model = full_size(jax.devices("cpu")[0])
    checks = shape_checks(model, FLAGS.checkpoint)
    checks += [loss_check(pathlib.Path(FLAGS.demo)), *experiment_checks(results)]
    found = costs(model)
    checks.append(cost_check(found))
    for check in checks:
        print(f"{check.source}: {check.claim}\n    {check.verdict}. {check.figure}", flush=True)
    outputs.write_text(out, page(checks, found, FLAGS.results))
    print(json.dumps({"checks": [dataclasses.asdict(c) for c in checks], "costs": found}))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
