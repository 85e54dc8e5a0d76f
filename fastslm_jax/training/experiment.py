"""From a config to a model, its parameters on a mesh, and its data: what train, eval, transcribe and the tools share."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fastslm_jax import audio, sharding
from fastslm_jax.data import longform, packing, prompts
from fastslm_jax.data import rows as pipeline
from fastslm_jax.errors import UserError
from fastslm_jax.models import attention
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.hfq_former import HFQFormer
from fastslm_jax.models.lora import LoRA
from fastslm_jax.training import optim
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import pretrained


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The model of a config, and the folders of its two bases."""

    model: FastSLM
    whisper_folder: pathlib.Path
    llm_folder: pathlib.Path

    def prompt_tokenizer(self) -> prompts.PromptTokenizer:
        return prompts.PromptTokenizer(
            prompts.load_tokenizer(self.llm_folder, self.model.llm.vocab_size)
        )

    def fingerprints(self) -> dict[str, str]:
        return {
            "whisper": pretrained.fingerprint(self.whisper_folder),
            "llm": pretrained.fingerprint(self.llm_folder),
        }


def build(
    config: ConfigDict,
    *,
    weights: bool = True,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> Experiment:
    """Reads the bases' config.json and builds the modules.

    Args:
        weights: False looks for no weights (plans, shapes).
        mesh: what the arrays will lie on; some attention kernels need it.
        platform: "cpu", "tpu" or "gpu", whose attention kernel is taken; by default that of the mesh or of this machine.
    """
    whisper_folder = pretrained.resolve(config.base.whisper, weights=weights)
    llm_folder = pretrained.resolve(config.base.llm, weights=weights)
    options = config.model
    dtype = jnp.dtype(options.dtype)
    if platform is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    attention_kernel = attention.choose(options.attention, platform, dtype, mesh)
    llm = pretrained.qwen3_from_config(
        pretrained.read_config(llm_folder),
        lora=LoRA(**options.lora),
        dtype=dtype,
        remat=options.remat,
        origin=str(llm_folder),
    ).clone(attention_kernel=attention_kernel, scan_layers=options.scan_layers)
    encoder = pretrained.whisper_from_config(
        pretrained.read_config(whisper_folder),
        dtype=dtype,
        remat=options.remat,
        origin=str(whisper_folder),
    ).clone(attention_kernel=attention_kernel, scan_layers=options.scan_layers)
    hfq_former = HFQFormer(
        llm.width, tuple(options.stage_tokens), options.compression_size, options.detail_recovery_layers,
        attention_kernel=attention_kernel, dtype=dtype,
    )  # fmt: skip
    if options.query_init not in ("normal", "temporal"):
        raise UserError(
            f"config.model.query_init={options.query_init!r} is neither normal nor temporal"
        )
    audio.WindowSpec(padding=options.audio_padding)
    windows, group = config.data.row.windows, options.window_batch
    if group and windows % group:
        near = " and ".join(map(str, sharding.nearest_divisors(windows, group)))
        raise UserError(
            f"config.model.window_batch={group} does not divide the {windows} windows of config.data.row; these do: {near}"
        )
    model = FastSLM(
        encoder,
        hfq_former,
        llm,
        window_batch=options.window_batch,
        audio_padding=options.audio_padding,
        query_init=options.query_init,
    )
    return Experiment(model, whisper_folder, llm_folder)


def is_base(path: str) -> bool:
    """Does a parameter come from a base's folder (and not from training)?"""
    return path.startswith(("encoder/", "llm/")) and not path.endswith(("/lora_a", "/lora_b"))


def abstract_params(
    model: FastSLM, base_dtype, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by path: bases in base_dtype, the rest in float32, with its sharding on the mesh."""
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    shardings = (
        dict.fromkeys(leaves) if mesh is None else sharding.parameter_shardings(leaves, mesh)
    )
    return {
        path: jax.ShapeDtypeStruct(
            leaf.shape, base_dtype if is_base(path) else jnp.float32, sharding=shardings[path]
        )
        for path, leaf in leaves.items()
    }


def init_params(experiment: Experiment, base_dtype, mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Bases from their folders (each process reads what its devices hold), the rest from the seed. Flat: {path: array}."""
    model = experiment.model
    abstract = abstract_params(model, base_dtype, mesh)
    ours = {path: leaf for path, leaf in abstract.items() if not is_base(path)}

    def init_ours(key):
        leaves = flatten_dict(model.init(key), sep="/")
        return {path: leaves[path].astype(leaf.dtype) for path, leaf in ours.items()}

    shardings = {path: leaf.sharding for path, leaf in ours.items()}
    leaves = jax.jit(init_ours, out_shardings=shardings)(jax.random.key(seed))
    return {**leaves, **load_bases(experiment, abstract)}


def load_bases(
    experiment: Experiment, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The bases' parameters out of their folders, in the types and shardings of `abstract`. Flat: {path: array}."""
    tree = unflatten_dict({path: leaf for path, leaf in abstract.items() if is_base(path)}, sep="/")
    loaded = {
        "encoder": pretrained.load_whisper(experiment.whisper_folder, tree["encoder"]),
        "llm": pretrained.load_qwen3(experiment.llm_folder, tree["llm"]),
    }
    return flatten_dict(loaded, sep="/")


def restore_params(
    experiment: Experiment, config: ConfigDict, checkpoints: Checkpoints, step: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Parameters of a checkpoint over those of its bases. Flat: {path: array}.

    Raises:
        CheckpointError: a base is not the one that the checkpoint was trained on.
    """
    checkpoints.check_bases(step, experiment.fingerprints())
    abstract = abstract_params(experiment.model, config.model.base_dtype, mesh)
    saved = {path: abstract[path] for path in saved_paths(abstract, config.trainable)}
    return load_bases(experiment, abstract) | checkpoints.restore_params(step, saved)


def saved_paths(paths: Iterable[str], trainable: Sequence[tuple[str, bool]]) -> list[str]:
    """What a checkpoint holds: all that training changes, and all that no base's folder has."""
    mask = optim.trainable_mask(sorted(paths), trainable)
    return [path for path in mask if mask[path] or not is_base(path)]


def row_shape(config: ConfigDict) -> packing.RowShape:
    return packing.RowShape(**config.data.row)


def data_fingerprints(config: ConfigDict) -> dict[str, str]:
    """{source: content hash of its manifest}, of sources with a weight: what decides, with the seed, what stands in which row."""
    found = {}
    for name in sorted(
        name for name, source in config.data.train.items() if source.get("weight", 1.0) > 0
    ):
        digest = hashlib.sha256()
        path = pathlib.Path(config.data.train[name].path).expanduser()
        files = (
            sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        )
        for file in files:
            if path.is_dir():  # a store of audio: its files are told apart by name and size
                digest.update(f"{file.relative_to(path)}:{file.stat().st_size}\n".encode())
            if not path.is_dir() or file.suffix in (".json", ".jsonl"):
                digest.update(file.read_bytes())
        found[name] = digest.hexdigest()[:32]
    return found


def make_rows(
    config: ConfigDict, experiment: Experiment, encoder: prompts.PromptTokenizer
) -> pipeline.PackedRows:
    """The training rows of a config."""
    sources = []
    for name in sorted(config.data.train):
        fields = config.data.train[name].to_dict()
        join = fields.pop("join", None)
        try:
            source = pipeline.MixtureSource(
                **fields, join=longform.LongForm(**join) if join else None
            )
        except TypeError as error:
            raise UserError(f"config.data.train.{name}: {error}") from None
        if source.weight > 0:
            sources.append(source)
    if not sources:
        raise UserError("config.data.train names no source with a positive weight")
    model = experiment.model
    return pipeline.PackedRows(
        sources, row_shape(config), model.window, model.tokens_per_window, encoder, config.seed
    )
