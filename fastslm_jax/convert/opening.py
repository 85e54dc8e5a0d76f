"""Opens a FastSLM in any format.

Opening checks the names and shapes of all tensors; weights in files are read on demand.
"""

import os
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
from pydantic import Field

from fastslm_jax import config as config_lib
from fastslm_jax import config_schema, schema, sharding
from fastslm_jax.convert import stored
from fastslm_jax.convert.released import open_released
from fastslm_jax.convert.stored import Stored
from fastslm_jax.errors import UserError
from fastslm_jax.inference import load
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import ConversionError, SafetensorsSource

HFQ_FIELDS = ("detail_recovery_layers", "downsample_factor", "compressor_projections")


class ExportedConfig(schema.Schema):
    """config.json of a folder written by `export --layout=hf`."""

    audio_config: dict[str, Any]
    text_config: dict[str, Any]
    stage_tokens: Annotated[list[config_schema.Slots], Field(min_length=1, max_length=8)]
    compression_size: config_schema.Slots
    detail_recovery_layers: config_schema.Layers
    downsample_factor: config_schema.DownsampleFactor = 2
    compressor_projections: bool = False
    has_adapter: bool
    dtype: config_schema.Dtype | None = None


class ExportedFeatures(schema.Schema):
    """Its preprocessor_config.json."""

    audio_padding: config_schema.AudioPadding


class ExportedAdapter(schema.Schema):
    """Its adapter_config.json."""

    rank: Annotated[config_schema.Rank, Field(gt=0, alias="r")]
    alpha: Annotated[config_schema.NotNegative, Field(alias="lora_alpha")]
    dropout: Annotated[config_schema.BelowOne, Field(alias="lora_dropout")]


def kind_of(path: str | os.PathLike) -> str:
    """The format at the path: "workdir", "hf" or "released"."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "checkpoints").is_dir():
        return "workdir"
    has_config = (path / "config.json").is_file()
    if has_config and pretrained.read_config(path).get("model_type") == "fastslm":
        return "hf"
    return "released"


def open_any(path: str | os.PathLike, *, llm: str | None = None, strict: bool = True) -> Stored:
    """Opens a working directory (its newest checkpoint), a released state_dict or a PyTorch folder.

    Args:
        llm: hub id or folder of the language model, for a released state_dict.
        strict: False skips the check of names and shapes and opens no leaves, so that the caller
            can compare the tensors in `source`.
    """
    kind = kind_of(path)
    if kind == "workdir":
        return open_workdir(path)
    if kind == "hf":
        return open_hf(path, strict=strict)
    return open_released(path, llm=llm, strict=strict)


def open_workdir(path: str | os.PathLike, step: int | None = None) -> Stored:
    """Opens a checkpoint of a working directory (default: the newest) and its pretrained models."""
    checkpoints = Checkpoints(path, read_only=True)
    step = load.find_step(checkpoints, path, step)
    config = load.saved_config(checkpoints, path, step)
    setup = experiment.build(config)
    checkpoints.check_bases(step, setup.fingerprints())
    mesh = sharding.make_mesh(data=1, devices=jax.local_devices()[:1])
    abstract = experiment.abstract_params(setup.model, config.model.base_dtype, mesh)
    saved = experiment.saved_paths(abstract, config.trainable)
    restored = checkpoints.restore_params(step, {path: abstract[path] for path in saved})
    meta = checkpoints.meta(step)
    checkpoints.close()
    leaves = _open_pretrained(setup, abstract)
    leaves |= {path: np.asarray(leaf) for path, leaf in restored.items()}
    return Stored(
        "workdir",
        pathlib.Path(path),
        config,
        setup.model,
        leaves,
        pretrained.read_config(setup.llm_folder) | {"vocab_size": setup.model.llm.vocab_size},
        setup.llm_folder,
        step=step,
        meta=meta,
    )


def _open_pretrained(
    setup: experiment.Experiment, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, engine.Leaf]:
    """Like `experiment.load_pretrained`, but read on demand and in the dtype of the files."""
    tree = engine.unflatten(
        {path: leaf for path, leaf in abstract.items() if experiment.is_base(path)}
    )
    encoder, llm = engine.flatten(tree["encoder"]), engine.flatten(tree["llm"])
    opened = {
        "encoder": pretrained.open_whisper(setup.whisper_folder, encoder, setup.cut_positions),
        "llm": pretrained.open_decoder(setup.llm_folder, llm, setup.added_rows),
    }
    return engine.flatten(opened)


def _read(path: pathlib.Path, kind: type[schema.Checked]) -> schema.Checked:
    """A JSON file of an exported folder.

    Raises:
        ConversionError: it is missing or was changed.
    """
    try:
        fields = schema.parse_json(path.read_bytes())
        return schema.check(kind, fields, path, ConversionError)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConversionError(f"{path}: {reason}; export the folder again") from None


def open_hf(path: str | os.PathLike, strict: bool = True) -> Stored:
    """Opens a folder written by `export --layout=hf`."""
    path = pathlib.Path(path)
    exported = _read(path / "config.json", ExportedConfig)
    config = config_lib.full_size()
    config.name = "imported"
    config.model.stage_tokens = tuple(exported.stage_tokens)
    for name in ("compression_size", *HFQ_FIELDS):
        config.model[name] = getattr(exported, name)
    features = _read(path / "preprocessor_config.json", ExportedFeatures)
    config.model.audio_padding = features.audio_padding
    if exported.has_adapter:
        adapter = _read(path / "adapter_config.json", ExportedAdapter)
        config.model.lora.update(adapter.model_dump())
    else:
        config.model.lora.rank = 0
        config.trainable = tuple(rule for rule in config.trainable if "lora" not in rule[0])
    llm_config, origin = exported.text_config, str(path)
    model = experiment.make_model(
        config.model, exported.audio_config, llm_config, whisper_origin=origin, llm_origin=origin
    )
    layout = layouts.hf_fastslm(len(config.model.stage_tokens), config.model.detail_recovery_layers)
    source = SafetensorsSource(path, adapter=exported.has_adapter)
    leaves = {}
    if strict:
        shapes = stored.param_shapes(model)
        leaves = engine.open_leaves(source, layout, shapes, sizes_from=f"{path}/config.json")
        stored.set_dtypes(config, leaves, exported.dtype)
    return Stored("hf", path, config, model, leaves, llm_config, path, source=source, layout=layout)
