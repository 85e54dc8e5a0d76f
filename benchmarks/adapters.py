"""Parameters, token rate and cost of the adapters, at the demo's and the full size.

    python benchmarks/adapters.py

Every adapter and some variants of the HFQ-Former, built from the two default configs with one field
changed. `parameters` are the trained ones of the adapter, and `ratio` is relative to the default
HFQ-Former of the size. `gflops` are the minimum of the adapter alone per second of audio, forward
and backward (docs/performance.md). Nothing is computed: only shapes are evaluated.
Last line: one JSON object.
"""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from banner import print_banner
from flax.traverse_util import flatten_dict

from fastslm_jax import cli
from fastslm_jax import config as config_lib
from fastslm_jax.models.adapters import ADAPTERS
from fastslm_jax.plan import published_configs
from fastslm_jax.training import experiment, optim

SIZES = {"demo": config_lib.small_size, "full": config_lib.full_size}
COLUMNS = ("parameters", "ratio", "tokens_per_second", "gflops")


def variants(stage_tokens: int) -> dict[str, dict]:
    """{name: fields of config.model that differ from the default}."""
    found = {name: {"adapter": name} for name in ADAPTERS}
    found |= {f"hfq, {count} recovery": {"detail_recovery_layers": count} for count in (0, 1)}
    for count in (1, 2, 4):
        plural = "scale" if count == 1 else "scales"
        found[f"hfq, {count} {plural}"] = {"stage_tokens": (stage_tokens,) * count}
    found["hfq, factor 4"] = {"downsample_factor": 4}
    found["hfq, projections"] = {"compressor_projections": True}
    return found


def measure(size: str, options: dict) -> dict[str, float]:
    config = SIZES[size]()
    config.model.update(options)
    with tempfile.TemporaryDirectory() as folder:
        for base in ("whisper", "llm"):
            config.base[base] = published_configs.local(config.base[base], pathlib.Path(folder))
        setup = experiment.build(config, weights=False)
    model, encoder = setup.model, setup.model.encoder
    features = jax.ShapeDtypeStruct((1, encoder.max_positions, encoder.width), "float32")
    params = jax.eval_shape(model.adapter.init, jax.random.key(0), features)["params"]
    leaves = flatten_dict({model.adapter.GROUP: params}, sep="/")
    mask = optim.trainable_mask([*leaves, "encoder/positions"], setup.trainable[:2])
    flops = model.adapter.minimum_flops(encoder.max_positions, encoder.width)
    return {
        "parameters": optim.count({path: leaf for path, leaf in leaves.items() if mask[path]}),
        "tokens_per_second": round(model.tokens_per_window / model.window.seconds, 2),
        "gflops": round(sum(flops.values()) / model.window.seconds / 1e9, 4),
    }


def main(_: list[str]) -> None:
    print_banner("Adapters from encoder features to speech tokens.", "cpu")
    result = {}
    for size, get_config in SIZES.items():
        queries = get_config().model.stage_tokens[0]
        rows = {name: measure(size, options) for name, options in variants(queries).items()}
        for row in rows.values():
            row["ratio"] = round(row["parameters"] / rows["hfq"]["parameters"], 2)
        result[size] = rows
        print(f"\n| {size} | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
        for name, row in rows.items():
            cells = [f"{row[column]:,}".replace(",", " ") for column in COLUMNS]
            print(f"| {name} | {' | '.join(cells)} |")
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
