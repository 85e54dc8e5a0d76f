"""Converts FastSLM between formats, compares models, averages checkpoints and makes them small.

    python -m fastslm_jax.convert import --from=PATH --out=WORKDIR [--llm=ID|DIR] [--lora_alpha=64]
    python -m fastslm_jax.convert export --workdir=WORKDIR [--step=N|best] --out=DIR
        --layout=released [--pt] | --layout=peft | --layout=hf [--merge_lora]
    python -m fastslm_jax.convert average --workdir=WORKDIR [--last=5] --out=WORKDIR
    python -m fastslm_jax.convert publish --workdir=WORKDIR [--step=N|best] --out=WORKDIR
        [--whisper=ID] [--llm=ID] [--dtype=float32]
    python -m fastslm_jax.convert check PATH PATH [--audio=FILE] [--llm=ID|DIR] [--notorch]

import: PATH is a released state_dict (.pt or .safetensors file, or folder) or a PyTorch folder.
export: released is the authors' state_dict, peft a LoRA adapter, hf a PyTorch folder.
average: writes the mean of the trained parameters of the newest checkpoints.
publish: writes the trained parameters of a checkpoint in bfloat16, with the pretrained models' ids.
check: PATH is a working directory, a released state_dict or a PyTorch folder.

The last line of output is one JSON object.
"""

import json
import resource
import sys
import time
import typing
from collections.abc import Sequence

from absl import flags

from fastslm_jax import cli, config_schema
from fastslm_jax.convert import averaging, checking, exporting, importing, publishing
from fastslm_jax.errors import UserError
from fastslm_jax.weights import engine

FLAGS_OF = {
    "import": {"from", "out", "llm", "lora_alpha"},
    "export": {"workdir", "step", "layout", "out", "merge_lora", "pt"},
    "average": {"workdir", "last", "out"},
    "publish": {"workdir", "step", "out", "whisper", "llm", "dtype"},
    "check": {"audio", "llm", "torch"},
}
PUBLISHED = ("step", "whisper", "llm", "dtype")
REQUIRED = {
    "import": ("from", "out"),
    "export": ("workdir", "layout", "out"),
    "average": ("workdir", "out"),
    "publish": ("workdir", "out"),
    "check": (),
}


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": flag_values}
    flags.DEFINE_string(
        "from", None, "import: released state_dict (file or folder) or PyTorch folder.", **options
    )
    flags.DEFINE_string(
        "out", None, "All but check: folder to write; must be new or empty.", **options
    )
    flags.DEFINE_string(
        "llm",
        None,
        "import, check: hub id or folder with the language model's config.json and tokenizer. "
        "publish: hub id that replaces the config's.",
        **options,
    )
    flags.DEFINE_string(
        "whisper", None, "publish: hub id of Whisper that replaces the config's.", **options
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        typing.get_args(config_schema.Dtype),
        "publish: type of activations and pretrained weights that replaces the config's.",
        **options,
    )
    flags.DEFINE_float(
        "lora_alpha", None, "import: LoRA alpha (default: from config.json, or 64).", **options
    )
    flags.DEFINE_string("workdir", None, "export, average, publish: working directory.", **options)
    flags.DEFINE_integer(
        "last", 5, "average: how many of the newest checkpoints.", lower_bound=2, **options
    )
    cli.define_step("step", "export, publish: checkpoint", flag_values)
    flags.DEFINE_string("layout", None, "export: released, peft or hf.", **options)
    flags.DEFINE_bool(
        "merge_lora", False, "export --layout=hf: merge LoRA into the weights.", **options
    )
    flags.DEFINE_bool("pt", False, "export --layout=released: also write model.pt.", **options)
    flags.DEFINE_string(
        "audio",
        None,
        "check: audio file for the logits (default: a fixed synthetic signal).",
        **options,
    )
    flags.DEFINE_bool("torch", True, "check: use PyTorch for PyTorch folders.", **options)


def main(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    command, arguments = (argv[1], argv[2:]) if len(argv) > 1 else ("", [])
    if command not in FLAGS_OF:
        raise UserError(
            f"command {command!r}: expected import, export, average, publish or check; for the "
            "flags, run python -m fastslm_jax.convert --help"
        )
    for name in set().union(*FLAGS_OF.values()) - FLAGS_OF[command]:
        if flag_values[name].present:
            allowed = ", ".join(f"--{flag}" for flag in sorted(FLAGS_OF[command]))
            raise UserError(f"--{name}: not a flag of {command}, which has {allowed}")
    for name in REQUIRED[command]:
        if flag_values[name].value is None:
            raise UserError(f"{command}: --{name} is required")
    if len(arguments) != (2 if command == "check" else 0):
        expected = "two paths" if command == "check" else "flags only"
        raise UserError(f"{command}: expected {expected}, got {' '.join(arguments) or 'none'}")
    values = {name: flag_values[name].value for name in FLAGS_OF[command]}
    try:
        run_check(*arguments, values) if command == "check" else convert(command, values)
    except OSError as error:  # such as a full disk or missing permissions
        raise UserError(f"{error.filename or command}: {error.strerror or error}") from None


def convert(command: str, values: dict) -> None:
    """Imports, exports, averages or publishes, and prints the JSON object."""
    started, out = time.time(), values["out"]
    if command == "average":
        given = values["workdir"]
        steps, tensors = averaging.average(given, out, values["last"])
        result, wrote = {"steps": steps}, f"step 0, the mean of steps {', '.join(map(str, steps))}"
    elif command == "publish":
        given, options = values["workdir"], {k: values[k] for k in PUBLISHED}
        step, tensors = publishing.publish(given, out, **options)
        result, wrote = {"step": step}, f"step {step}, trained parameters in bfloat16"
    elif command == "import":
        given, options = values["from"], {name: values[name] for name in ("llm", "lora_alpha")}
        opened = importing.import_checkpoint(given, out, **options)
        result, tensors = {"layout": opened.kind}, len(opened.source.keys())
        wrote = "checkpoint of step 0, bases/whisper and bases/llm"
    else:
        given, wrote = values["workdir"], values["layout"]
        options = {name: values[name] for name in ("step", "merge_lora", "pt")}
        result, tensors = {"layout": wrote}, len(exporting.export(given, out, wrote, **options))
    print(f"{given} → {out}: {wrote}", flush=True)
    result |= {
        "tensors": tensors,
        "seconds": round(time.time() - started, 2),
        "peak_rss_gib": _peak_rss_gib(),
    }
    print(json.dumps(result), flush=True)


def run_check(first: str, second: str, values: dict) -> None:
    """Compares two models, and prints a table and the JSON object.

    Raises:
        UserError: tensor names or shapes differ.
    """
    result = checking.check(
        first, second, audio_file=values["audio"], llm=values["llm"], torch=values["torch"]
    )
    groups = result.pop("groups")
    print(f"{'part':<12}{'tensors':>9}  largest difference")
    for name in sorted(groups, key=checking.GROUPS.index):
        count, largest = groups[name]
        print(f"{name:<12}{count:>9}  {largest:.3g}")
    for kind in checking.DIFFERENCES:
        for name in result[kind][:10]:
            print(f"{kind}: {name}")
        if len(result[kind]) > 10:
            print(f"{kind}: and {len(result[kind]) - 10} more")
    if result["max_abs_logit_difference"] is not None:
        difference, largest = result["max_abs_logit_difference"], result["max_abs_logit"]
        by = " and ".join(result["logits_by"])
        print(f"{'logits':<12}{'':>9}  {difference:.3g} (of up to {largest:.3g}; by {by})")
    print(json.dumps(result), flush=True)
    for kind in checking.DIFFERENCES:
        if result[kind]:
            raise UserError(
                f"{second}: {kind} tensor {engine.summarize(result[kind])}, compared with {first}"
            )


def _peak_rss_gib() -> float:
    """Peak resident memory of this process, including memory-mapped files."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
