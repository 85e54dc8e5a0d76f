"""From a config to its model, optimizer, parameters and data.

train.py, eval.py, transcribe and the tools all start here.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import sharding
from fastslm_jax.data import longform, packing, prompts
from fastslm_jax.data.rows import MixtureSource, PackedRows
from fastslm_jax.errors import UserError
from fastslm_jax.models import attention
from fastslm_jax.models.adapters import ADAPTERS, Adapter
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.spec_augment import SpecAugment
from fastslm_jax.training import base_configs, optim
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.training.step import StepConfig
from fastslm_jax.weights import pretrained


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes, as typed fields.

    Attributes:
        model: the modules.
        whisper_folder, llm_folder: pretrained weights, config.json and tokenizer.
        chat_template: config.model.chat_template.
        cut_positions: positions of the encoder that are left out, for shorter windows.
        added_rows: rows of the embedding table that the added tokens need beyond the pretrained
            ones.
        base_dtype: dtype of the pretrained weights on device.
        trainable: (pattern, is trained) by parameter path; the first match decides.
        row: slots of a packed row.
        global_batch_size: rows of a step, over all devices.
        settings: settings of the train step.
        schedule: learning rate by step.
        optimizer: the update rule, which includes the schedule.
    """

    model: FastSLM
    whisper_folder: pathlib.Path
    llm_folder: pathlib.Path
    chat_template: str
    cut_positions: int
    added_rows: int
    base_dtype: np.dtype
    trainable: tuple[tuple[str, bool], ...]
    row: packing.RowShape
    global_batch_size: int
    settings: StepConfig
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    def prompt_tokenizer(self) -> prompts.PromptTokenizer:
        return prompts.PromptTokenizer(
            prompts.load_tokenizer(
                self.llm_folder, self.model.llm.vocab_size, chat_template=self.chat_template
            )
        )

    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the pretrained weights."""
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
    """Builds the modules and the optimizer. Reads the config.json of the pretrained folders.

    Args:
        weights: whether the folders must have weights; False is enough for shapes.
        mesh: mesh of the arrays; some attention kernels need it.
        platform: "cpu", "tpu" or "gpu", for the choice of the attention kernel. Default: the
            platform of the mesh, or of this machine.

    Raises:
        UserError: a field of the config, or a pretrained folder, cannot be used.
    """
    config_lib.check(config)
    windows, group = config.data.row.windows, config.model.window_batch
    if group and windows % group:
        nearest = sharding.nearest_divisors(windows, group)
        raise UserError(
            f"config.model.window_batch={group} does not divide the {windows} windows of "
            f"config.data.row; choose {' or '.join(map(str, nearest))}"
        )
    whisper_folder = pretrained.resolve(config.base.whisper, weights=weights)
    llm_folder = pretrained.resolve(config.base.llm, weights=weights)
    row = packing.RowShape(**config.data.row)
    if platform is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    kernel = attention.choose(config.model.attention, platform, jnp.dtype(config.model.dtype), mesh)
    schedule, optimizer = _make_optimizer(config.optimizer, config.steps)
    chat_template = config.model.chat_template
    llm_config, added_rows = base_configs.with_added_rows(
        pretrained.read_config(llm_folder), llm_folder, chat_template
    )
    whisper_config, cut_positions = base_configs.with_window(
        pretrained.read_config(whisper_folder),
        config.model.window_seconds,
        str(whisper_folder),
    )
    model = make_model(
        config.model,
        whisper_config,
        llm_config,
        whisper_origin=str(whisper_folder),
        llm_origin=str(llm_folder),
        kernel=kernel,
        dtype=jnp.dtype(config.model.dtype),
    )
    return Experiment(
        model=model,
        whisper_folder=whisper_folder,
        llm_folder=llm_folder,
        chat_template=chat_template,
        cut_positions=cut_positions,
        added_rows=added_rows,
        base_dtype=jnp.dtype(config.model.base_dtype),
        trainable=tuple((pattern, is_trained) for pattern, is_trained in config.trainable),
        row=row,
        global_batch_size=config.global_batch_size,
        settings=StepConfig(
            label_slots=row.labels,
            loss_chunk=config.loss_chunk,
            accumulate=config.accumulate,
            input_token_noise=config.input_token_noise,
            spec_augment=SpecAugment(**config.spec_augment),
            seed=config.seed,
        ),
        schedule=schedule,
        optimizer=optimizer,
    )


def make_model(
    options: ConfigDict,
    whisper_config: dict,
    llm_config: dict,
    *,
    whisper_origin: str,
    llm_origin: str,
    kernel: attention.AttentionKernel = attention.AttentionKernel(),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> FastSLM:
    """The modules.

    Args:
        options: config.model.
        whisper_config, llm_config: config.json of the pretrained models.
        whisper_origin, llm_origin: where these come from, for error messages.
        dtype: of activations.

    Raises:
        UserError: the models cannot be combined, or a field is not supported.
    """
    encoder = pretrained.whisper_from_config(
        whisper_config, dtype=dtype, remat=options.remat, origin=whisper_origin
    ).clone(attention_kernel=kernel, scan_layers=options.scan_layers)
    llm = pretrained.decoder_from_config(
        llm_config, lora=LoRA(**options.lora), dtype=dtype, remat=options.remat, origin=llm_origin
    ).clone(attention_kernel=kernel, scan_layers=options.scan_layers)
    adapter = make_adapter(options, encoder.max_positions, llm.width, kernel, dtype)
    adapter.check(encoder.max_positions, encoder.width, whisper_origin)
    return FastSLM(
        encoder,
        adapter,
        llm,
        window_batch=options.window_batch,
        audio_padding=options.audio_padding,
        query_init=options.query_init,
    )


def make_adapter(
    options: ConfigDict,
    frames: int,
    output_width: int,
    kernel: attention.AttentionKernel,
    dtype: jax.typing.DTypeLike,
) -> Adapter:
    """The adapter of config.model.adapter, with the fields of config.model that it has.

    Args:
        options: config.model.
        frames: encoder features of a window.
        output_width: width of the language model.
    """
    fields = {
        "stage_tokens": tuple(options.stage_tokens),
        "detail_recovery_layers": options.detail_recovery_layers,
        "downsample_factor": options.downsample_factor,
        "compressor_projections": options.compressor_projections,
        "num_layers": options.qformer_layers,
        "mlp_dim": options.adapter_mlp_dim,
    }
    kind = ADAPTERS[options.adapter]
    return kind(
        output_width=output_width,
        compression_size=options.compression_size or base_configs.speech_tokens(frames),
        attention_kernel=kernel,
        dtype=dtype,
        **{name: value for name, value in fields.items() if hasattr(kind, name)},
    )


def _make_optimizer(
    options: ConfigDict, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    schedule = optim.schedule(
        options.schedule,
        options.learning_rate,
        steps,
        options.warmup_steps,
        options.final_fraction,
    )
    optimizer = optim.make_optimizer(
        options.name,
        schedule,
        weight_decay=options.weight_decay,
        b1=options.b1,
        b2=options.b2,
        clip_norm=options.clip_norm,
        adam_learning_rate_ratio=options.adam_learning_rate_ratio,
        learning_rate_ratios=[tuple(row) for row in options.learning_rate_ratios],
    )
    return schedule, optimizer


# -------------------------------------------------------------------------------------- parameters


def is_base(path: str) -> bool:
    """Whether a parameter comes from a pretrained folder."""
    return path.startswith(("encoder/", "llm/")) and not path.endswith(("/lora_a", "/lora_b"))


def saved_paths(paths: Iterable[str], trainable: Sequence[tuple[str, bool]]) -> list[str]:
    """Parameters that a checkpoint stores: trained ones, and those in no pretrained folder."""
    mask = optim.trainable_mask(sorted(paths), trainable)
    return [path for path in mask if mask[path] or not is_base(path)]


def abstract_params(
    model: FastSLM, base_dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape, dtype and sharding}: pretrained weights in base_dtype, others in float32."""
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


def init_params(experiment: Experiment, mesh: Mesh) -> dict[str, jax.Array]:
    """{path: array}: pretrained weights from their folders, everything else from the seed."""
    model = experiment.model
    abstract = abstract_params(model, experiment.base_dtype, mesh)
    new = {path: leaf for path, leaf in abstract.items() if not is_base(path)}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten_dict(model.init(key), sep="/")
        return {path: leaves[path].astype(leaf.dtype) for path, leaf in new.items()}

    shardings = {path: leaf.sharding for path, leaf in new.items()}
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(experiment.settings.seed))
    return params | load_pretrained(experiment, abstract)


def load_pretrained(
    experiment: Experiment, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """{path: array} from the pretrained folders, with the dtypes and shardings of `abstract`.

    Each process reads only what its devices need.
    """
    tree = unflatten_dict({path: leaf for path, leaf in abstract.items() if is_base(path)}, sep="/")
    loaded = {
        "encoder": pretrained.load_whisper(
            experiment.whisper_folder, tree["encoder"], experiment.cut_positions
        ),
        "llm": pretrained.load_decoder(experiment.llm_folder, tree["llm"], experiment.added_rows),
    }
    return flatten_dict(loaded, sep="/")


def restore_params(
    experiment: Experiment,
    checkpoints: Checkpoints,
    step: int,
    mesh: Mesh,
    other_bases: bool = False,
) -> dict[str, jax.Array]:
    """{path: array}: the pretrained weights, overridden by the parameters of a checkpoint.

    Args:
        other_bases: accept pretrained weights that the checkpoint was not trained on, for example
            the same model in another precision.

    Raises:
        CheckpointError: the checkpoint was trained on different weights, or does not fit.
    """
    checkpoints.check_bases(step, experiment.fingerprints(), other_bases)
    abstract = abstract_params(experiment.model, experiment.base_dtype, mesh)
    saved = {path: abstract[path] for path in saved_paths(abstract, experiment.trainable)}
    return load_pretrained(experiment, abstract) | checkpoints.restore_params(step, saved)


# -------------------------------------------------------------------------------------------- data


def make_rows(
    sources: ConfigDict, experiment: Experiment, tokenizer: prompts.PromptTokenizer
) -> PackedRows:
    """The training rows of a mixture.

    Args:
        sources: {name: source} of config.data.train; sources of weight 0 are left out.
    """
    mixture = []
    for name in sorted(sources):
        fields = sources[name].to_dict()
        join = fields.pop("join", None)
        try:
            source = MixtureSource(**fields, join=longform.LongForm(**join) if join else None)
        except (TypeError, UserError) as error:
            raise UserError(f"config.data.train.{name}: {error}") from None
        if source.weight > 0:
            mixture.append(source)
    if not mixture:
        raise UserError("config.data.train names no source with a positive weight")
    return PackedRows(
        mixture,
        experiment.row,
        experiment.model.window,
        experiment.model.tokens_per_window,
        tokenizer,
        experiment.settings.seed,
    )


def data_fingerprints(sources: ConfigDict) -> dict[str, str]:
    """{source: content hash of its manifest}; sources of weight 0 are left out.

    Together with the seed, these manifests determine the content of every row.
    """
    return {
        name: _manifest_hash(pathlib.Path(sources[name].path).expanduser())
        for name in sorted(sources)
        if sources[name].get("weight", 1.0) > 0
    }


def _manifest_hash(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    if not path.is_dir():
        digest.update(path.read_bytes())
        return digest.hexdigest()[:32]
    # An imported folder: audio files count by name and size, JSON files by content.
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}\n".encode())
        if file.suffix in (".json", ".jsonl"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
