"""Linear probes: what the speech tokens keep of speaker, pitch, rate, style, and kind of sound.

    python -m fastslm_jax.probes --checkpoint=WORKDIR --out=DIR [--targets=speaker,pitch]

For each target, logistic regressions are trained on the mean log-mel spectrogram of a window, the
mean of the encoder's frames, the mean of the speech tokens, and all speech tokens. The clips are
synthetic (espeak-ng: pip install -r requirements-demo.txt). Writes DIR/probes.json and
DIR/probes.md; docs/probes.md explains both. An interrupted run resumes after its last target.
"""

from absl import flags

from fastslm_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Working directory of a trained or imported model.")
    flags.DEFINE_string("out", None, "Folder for probes.json and probes.md.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint (default: the newest).")
    flags.DEFINE_list("targets", [], "Targets to probe (default: all).")
    flags.DEFINE_integer("clips", 96, "Training clips per class.", lower_bound=8)
    flags.DEFINE_integer("seed", 0, "Seed of the clips.")


if __name__ == "__main__":
    define_flags()
    cli.parse_flags(required=("checkpoint", "out"))  # before the imports below, which take seconds

import json
import pathlib
from collections.abc import Sequence

from absl import logging

from fastslm_jax import outputs
from fastslm_jax.errors import UserError
from fastslm_jax.inference import api
from fastslm_jax.probes.clips import TARGETS
from fastslm_jax.probes.measure import FEATURES, measure
from fastslm_jax.synthesis import espeak


def table(results: Sequence[dict]) -> str:
    """A Markdown table: a line per target, a column per kind of features."""
    header = ("target", "classes", "chance", "majority", *FEATURES, "test clips")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for target in dict.fromkeys(result["target"] for result in results):
        found = {r["features"]: r for r in results if r["target"] == target}
        first = next(iter(found.values()))
        cells = [target, str(len(first["recall"]))]
        cells += [f"{100 * first[key]:.1f}" for key in ("chance", "majority")]
        for name in FEATURES:
            low, high = found[name]["interval"]
            cells.append(f"{100 * found[name]['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {' | '.join([*cells, str(first['test'])])} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise UserError(f"probes takes flags only, not {argv[1]!r}; --help lists them")
    targets = tuple(FLAGS.targets) or tuple(TARGETS)
    for target in targets:
        if target not in TARGETS:
            raise UserError(f"--targets={target}: is not one of {', '.join(TARGETS)}")
    espeak.check()
    out = outputs.check_folder(FLAGS.out, "--out")
    generator = api.load(FLAGS.checkpoint, FLAGS.step).generator
    model = generator.encode_speech.model
    settings = {name: FLAGS[name].value for name in ("checkpoint", "step", "clips", "seed")}
    results = finished(out / "probes.json", settings)
    for target in targets:
        if target not in {result["target"] for result in results}:
            results += measure(model, generator.params, FLAGS.seed, FLAGS.clips, (target,))
            text = json.dumps({**settings, "results": results}, indent=1)
            outputs.write_text(out / "probes.json", text + "\n")
            logging.info("probes: %s is done", target)
    text = table(results)
    outputs.write_text(out / "probes.md", f"Accuracy in % [95 % interval].\n\n{text}\n")
    print(text)


def finished(path: pathlib.Path, settings: dict) -> list[dict]:
    """The results that a run with the same flags has left."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.pop("results") if settings == {k: found.get(k) for k in settings} else []


if __name__ == "__main__":
    cli.run(main)
