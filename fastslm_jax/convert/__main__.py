"""Converts FastSLM between its forms.

    python -m fastslm_jax.convert import --from=FILE.pt|FILE.safetensors|DIR --out=WORKDIR [--llm=ID|DIR] [--lora_alpha=64]
    python -m fastslm_jax.convert export --workdir=WORKDIR [--step=N] --layout=released|peft|hf --out=DIR [--merge_lora] [--pt]
    python -m fastslm_jax.convert check A B [--audio=FILE] [--llm=ID|DIR] [--notorch]

A and B are any of: working directory, released state_dict (file or folder), folder of `export --layout=hf`. The last line of
output is one JSON object.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence

from absl import flags

from fastslm_jax import cli
from fastslm_jax.convert import checking, exporting, importing
from fastslm_jax.errors import UserError

USAGE = __doc__.split("\n\n")[1]
FLAGS_OF = {
    "import": {"from", "out", "llm", "lora_alpha"},
    "export": {"workdir", "step", "layout", "out", "merge_lora", "pt"},
    "check": {"audio", "llm", "torch"},
}
REQUIRED = {"import": ("from", "out"), "export": ("workdir", "layout", "out"), "check": ()}


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": flag_values}
    flags.DEFINE_string(
        "from",
        None,
        "Released state_dict (.pt or .safetensors), a folder with it, or a PyTorch folder.",
        **options,
    )
    flags.DEFINE_string("out", None, "Folder to write; it must not exist.", **options)
    flags.DEFINE_string(
        "llm",
        None,
        "Hub id or folder with the language model's config.json and tokenizer.",
        **options,
    )
    flags.DEFINE_float(
        "lora_alpha",
        None,
        "LoRA's alpha, which no tensor tells (default: config.json's, or 64).",
        **options,
    )
    flags.DEFINE_string("workdir", None, "Working directory to export.", **options)
    flags.DEFINE_integer("step", None, "Checkpoint to export (default: the newest).", **options)
    flags.DEFINE_string("layout", None, "released, peft or hf.", **options)
    flags.DEFINE_bool("merge_lora", False, "hf: add LoRA into the weights.", **options)
    flags.DEFINE_bool("pt", False, "released: write model.pt too.", **options)
    flags.DEFINE_string(
        "audio",
        None,
        "File that logits are compared on (default: a fixed synthetic signal).",
        **options,
    )
    flags.DEFINE_bool(
        "torch", True, "Let PyTorch folders give their logits through PyTorch.", **options
    )


def main(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    command, arguments = (argv[1], argv[2:]) if len(argv) > 1 else ("", [])
    if command not in FLAGS_OF:
        raise UserError(
            f"{command or 'nothing'}: is not one of import, export, check; usage: {' | '.join(USAGE.split(chr(10)))}"
        )
    for name in set().union(*FLAGS_OF.values()) - FLAGS_OF[command]:
        if flag_values[name].present:
            raise UserError(
                f"--{name}: is no flag of {command}; it has {', '.join('--' + flag for flag in sorted(FLAGS_OF[command]))}"
            )
    for name in REQUIRED[command]:
        if flag_values[name].value is None:
            raise UserError(f"{command} needs --{name}")
    if len(arguments) != (2 if command == "check" else 0):
        raise UserError(
            f"{command} takes {'two paths' if command == 'check' else 'flags only'}, got {' '.join(arguments) or 'none'}"
        )
    values = {name: flag_values[name].value for name in FLAGS_OF[command]}
    try:
        run_check(*arguments, values) if command == "check" else convert(command, values)
    except OSError as error:  # a full disk, a folder without permission
        raise UserError(f"{error.filename or command}: {error.strerror or error}") from None


def convert(command: str, values: dict) -> None:
    """Imports or exports, and prints the JSON object."""
    started = time.time()
    if command == "import":
        given = importing.import_checkpoint(
            values["from"], values["out"], llm=values["llm"], lora_alpha=values["lora_alpha"]
        )
        layout, tensors = given.kind, len(given.source.keys())
        print(
            f"{values['from']} → {values['out']}: checkpoint of step 0, bases/whisper and bases/llm",
            flush=True,
        )
    else:
        layout = values["layout"]
        tensors = len(
            exporting.export(
                values["workdir"],
                values["out"],
                layout,
                step=values["step"],
                merge_lora=values["merge_lora"],
                pt=values["pt"],
            )
        )
        print(f"{values['workdir']} → {values['out']}: {layout}", flush=True)
    figures = {
        "layout": layout,
        "tensors": tensors,
        "seconds": round(time.time() - started, 2),
        "peak_rss_gib": _peak_rss_gib(),
    }
    print(json.dumps(figures), flush=True)


def run_check(first: str, second: str, values: dict) -> None:
    """Prints the table and the JSON object.

    Raises:
        UserError: the two are not of one shape.
    """
    result = checking.check(
        first, second, audio_file=values["audio"], llm=values["llm"], torch=values["torch"]
    )
    groups = result.pop("groups")
    print(f"{'part':<12}{'tensors':>9}  largest difference")
    for name in sorted(groups, key=checking.GROUPS.index):
        count, largest = groups[name]
        print(f"{name:<12}{count:>9}  {largest:.3g}")
    for kind in ("missing", "extra", "misshapen"):
        for name in result[kind][:10]:
            print(f"{kind}: {name}")
        if len(result[kind]) > 10:
            print(f"{kind}: and {len(result[kind]) - 10} more")
    if result["max_abs_logit_difference"] is not None:
        by = " and ".join(result["logits_by"])
        print(
            f"{'logits':<12}{'':>9}  {result['max_abs_logit_difference']:.3g} (of up to {result['max_abs_logit']:.3g}; by {by})"
        )
    print(json.dumps(result), flush=True)
    for kind, where in (
        ("missing", f"is missing from {second}"),
        ("extra", f"is not in {first}"),
        ("misshapen", "has two shapes"),
    ):
        if result[kind]:
            raise UserError(
                f"{first} and {second} differ: tensor {result[kind][0]} {where} ({len(result[kind])} such)"
            )


def _peak_rss_gib() -> float:
    """The most memory that this process had, mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
