"""A FastSLM on disk, in each of its forms: working directory, released state_dict, folder for PyTorch.

Opening checks every name and shape and reads no weights.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from fastslm_jax import audio
from fastslm_jax import config as config_lib
from fastslm_jax.errors import UserError
from fastslm_jax.inference import load
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.hfq_former import HFQFormer
from fastslm_jax.models.lora import LoRA
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import (
    ConversionError,
    SafetensorsSource,
    Tensor,
    TensorSource,
    open_file,
)

HEAD_DIM = 64  # of Whisper and the HFQ-Former, in every published size
WHISPER_LAYERS = {384: 4, 512: 6, 768: 12, 1024: 24, 1280: 32}  # by width


@dataclasses.dataclass(frozen=True)
class Stored:
    """An opened FastSLM.

    leaves: {path: StoredLeaf, or numpy array}, every parameter in the type it has on disk.
    llm_config: the language model's config.json.  tokenizer: folder.  meta: of a working directory's checkpoint.
    source, layout: the file's tensors and names, where there is one file for all.
    """

    kind: str  # workdir, released or hf
    path: pathlib.Path
    config: ConfigDict
    model: FastSLM
    leaves: dict[str, engine.StoredLeaf | np.ndarray]
    llm_config: dict
    tokenizer: pathlib.Path
    step: int = 0
    meta: dict = dataclasses.field(default_factory=dict)
    source: TensorSource | None = None
    layout: engine.Layout | None = None

    @property
    def has_lora(self) -> bool:
        return self.model.llm.lora.rank > 0

    def merged(self) -> "Stored":
        """LoRA added into the weights that it adapts, in float32, and gone as such."""
        if not self.has_lora:
            return self
        model = dataclasses.replace(self.model, llm=self.model.llm.clone(lora=LoRA()))
        config = self.config.copy_and_resolve_references()
        config.model.lora.rank = 0
        return dataclasses.replace(
            self,
            model=model,
            config=config,
            leaves=merge_lora(self.leaves, self.model.llm.lora.scale),
        )


def kind_of(path: str | os.PathLike) -> str:
    """workdir, hf or released, by what lies at the path."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "checkpoints").is_dir():
        return "workdir"
    if (path / "config.json").is_file() and pretrained.read_config(path).get(
        "model_type"
    ) == "fastslm":
        return "hf"
    return "released"


def open_any(
    path: str | os.PathLike, *, llm: str | None = None, step: int | None = None, strict: bool = True
) -> Stored:
    """Opens whatever lies at the path. Not strict: a file's missing and extra tensors are for the caller to find."""
    kind = kind_of(path)
    if kind == "workdir":
        return open_workdir(path, step)
    return (
        open_hf(path, strict=strict)
        if kind == "hf"
        else open_released(path, llm=llm, strict=strict)
    )


# -------------------------------------------------------------------------------------------------------------- workdir


def open_workdir(path: str | os.PathLike, step: int | None = None) -> Stored:
    """The newest checkpoint of a working directory, or that of a step, over its bases."""
    checkpoints = Checkpoints(path, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{path}: holds no finished checkpoint")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{path}: holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    step = steps[-1] if step is None else step
    meta = checkpoints.meta(step)
    config = load.saved_config(checkpoints, path, step)
    setup = experiment.build(config)
    checkpoints.check_bases(step, setup.fingerprints())
    abstract = experiment.abstract_params(setup.model, config.model.base_dtype)
    encoder = {
        path.removeprefix("encoder/"): leaf
        for path, leaf in abstract.items()
        if path.startswith("encoder/")
    }
    llm = {
        path.removeprefix("llm/"): leaf
        for path, leaf in abstract.items()
        if path.startswith("llm/") and experiment.is_base(path)
    }
    leaves = {
        f"encoder/{path}": leaf
        for path, leaf in pretrained.open_whisper(setup.whisper_folder, encoder).items()
    }
    leaves |= {
        f"llm/{path}": leaf for path, leaf in pretrained.open_qwen3(setup.llm_folder, llm).items()
    }
    device = SingleDeviceSharding(jax.local_devices()[0])
    saved = experiment.saved_paths(abstract, config.trainable)
    restored = checkpoints.restore_params(
        step,
        {
            path: jax.ShapeDtypeStruct(abstract[path].shape, abstract[path].dtype, sharding=device)
            for path in saved
        },
    )
    checkpoints.close()
    leaves |= {path: np.asarray(leaf) for path, leaf in restored.items()}
    llm_config = pretrained.read_config(setup.llm_folder)
    return Stored(
        "workdir",
        pathlib.Path(path),
        config,
        setup.model,
        leaves,
        llm_config,
        setup.llm_folder,
        step=step,
        meta=meta,
    )


# ------------------------------------------------------------------------------------------------------------- released


def open_released(
    path: str | os.PathLike,
    *,
    llm: str | None = None,
    lora_alpha: float | None = None,
    strict: bool = True,
) -> Stored:
    """The authors' state_dict: a file, or a folder with it and, it may be, config.json and tokenizer/.

    Sizes come from the tensors; those of the language model, whose heads no tensor tells, from the config.json of `llm` (a
    hub id or folder) or of the folder. A folder's config.json must agree with the tensors.
    """
    path = pathlib.Path(path)
    source = _open_state_dict(path)
    folder = path if path.is_dir() else path.parent
    given = pretrained.read_config(folder) if (folder / "config.json").is_file() else {}
    given = given if isinstance(given.get("llm"), dict) else {}
    if not isinstance(given.get("lora", {}), dict):
        raise ConversionError(
            f"{folder}/config.json: lora is {given['lora']!r}, an object with r and alpha is needed"
        )
    if llm is not None:
        tokenizer = pretrained.resolve(llm, weights=False)
        llm_config = pretrained.read_config(tokenizer)
    elif given:
        llm_config = given["llm"]
        tokenizer = folder / "tokenizer"
        if not tokenizer.is_dir():
            raise UserError(
                f"{folder}: holds no tokenizer/; name the language model with --llm=ID|DIR"
            )
    else:
        raise UserError(
            f"{path}: its tensors do not tell the language model's heads; name it with --llm=ID|DIR"
        )
    sizes = _released_sizes(source)
    _check_sizes(sizes, given, folder / "config.json", source)
    lora = given.get("lora", {})
    sizes["encoder_heads"] = given.get("encoder_heads", sizes["encoder_heads"])
    config = config_lib.full_size()
    config.name = "imported"
    config.model.update(
        {
            name: sizes[name]
            for name in ("stage_tokens", "compression_size", "detail_recovery_layers")
        }
    )
    config.model.audio_padding = given.get("audio_padding", "released")
    try:
        alpha = float(lora_alpha or lora.get("alpha", config.model.lora.alpha))
        dropout = float(lora.get("dropout", config.model.lora.dropout))
    except (TypeError, ValueError):
        raise ConversionError(
            f"{folder}/config.json: lora is {lora}, its alpha and dropout are to be numbers"
        ) from None
    config.model.lora.update({"rank": sizes["lora_rank"], "alpha": alpha, "dropout": dropout})
    whisper_config = {
        "d_model": sizes["speech_dim"],
        "encoder_layers": sizes["encoder_layers"],
        "encoder_attention_heads": sizes["encoder_heads"],
        "encoder_ffn_dim": sizes["mlp_dim"],
        "num_mel_bins": sizes["n_mels"],
        "max_source_positions": sizes["n_audio_ctx"],
    }
    origin = str(llm or folder)
    model = _model(config, whisper_config, llm_config, origin)
    layout = layouts.released(len(sizes["stage_tokens"]), sizes["detail_recovery_layers"])
    leaves = {}
    if strict:
        ignore = (
            pretrained.tied_head(source, layouts.RELEASED_LLM) if model.llm.tied_embeddings else ()
        )
        leaves = engine.open_leaves(
            source, layout, _shapes(model), ignore, f"the tensors and {origin}'s config.json"
        )
        _set_dtypes(config, leaves, given.get("dtype"))
    return Stored(
        "released", path, config, model, leaves, llm_config, tokenizer, source=source, layout=layout
    )


def _open_state_dict(path: pathlib.Path) -> TensorSource:
    if path.is_dir() and not list(path.glob("*.safetensors*")):
        files = [file for file in sorted(path.iterdir()) if file.suffix in (".pt", ".pth", ".bin")]
        if len(files) != 1:
            raise ConversionError(
                f"{path}: holds {len(files)} PyTorch files and no .safetensors; name the file itself"
            )
        path = files[0]
    return open_file(path)


def _released_sizes(source: TensorSource) -> dict:
    """Every size that the tensors tell."""
    keys = source.keys()

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in keys:
            raise ConversionError(
                f"{source.path}: tensor {key} is missing; is it a released FastSLM?"
            )
        if len(source.shape(key)) != rank:
            raise ConversionError(
                f"{source.path}: tensor {key} has shape {source.shape(key)}, it should have {rank} dimensions"
            )
        return source.shape(key)

    def count(pattern: str, first: int = 0) -> int:
        numbers = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
        return max(numbers) + 1 - first if numbers else 0

    width, num_mels, _ = shape("encoder.whisper.conv1.weight", 3)
    if width % HEAD_DIM:
        raise ConversionError(
            f"{source.path}: the encoder's width {width} is no multiple of its heads' {HEAD_DIM}"
        )
    num_stages = count(r"encoder\.compressor(\d+)\.", first=1)
    return {
        "speech_dim": width,
        "n_mels": num_mels,
        "encoder_heads": width // HEAD_DIM,
        "encoder_layers": count(r"encoder\.whisper\.blocks\.(\d+)\."),
        "mlp_dim": shape("encoder.whisper.blocks.0.mlp.0.weight", 2)[0],
        "n_audio_ctx": shape("encoder.whisper.positional_embedding", 2)[0],
        "stage_tokens": tuple(
            shape(f"encoder.compressor{stage}.query", 3)[1] for stage in range(1, num_stages + 1)
        ),
        "compression_size": shape("encoder.compressor.query", 3)[1],
        "detail_recovery_layers": count(r"encoder\.out_attn\.(\d+)\."),
        "lora_rank": shape(
            f"{layouts.RELEASED_LLM}model.layers.0.self_attn.q_proj.lora_A.default.weight", 2
        )[0],
    }


def _check_sizes(sizes: dict, given: dict, config_path: pathlib.Path, source: TensorSource) -> None:
    """A layer that is missing whole leaves no gap in the names, so counts must be known from elsewhere."""
    if given:
        said = {name: given[name] for name in sizes if name in given and name != "encoder_heads"}
        said["lora_rank"] = given.get("lora", {}).get("r", sizes["lora_rank"])
        origin = str(config_path)
    else:
        said = {
            "detail_recovery_layers": 2,
            "encoder_layers": WHISPER_LAYERS.get(sizes["speech_dim"], sizes["encoder_layers"]),
        }
        origin = f"a FastSLM of width {sizes['speech_dim']}"
    for name, value in said.items():
        value = tuple(value) if isinstance(value, list) else value
        if value != sizes[name]:
            raise ConversionError(
                f"{source.path}: its tensors have {name} {sizes[name]}, {origin} has {value}"
            )


# ------------------------------------------------------------------------------------------------------- PyTorch folder


def open_hf(path: str | os.PathLike, strict: bool = True) -> Stored:
    """A folder that `export --layout=hf` wrote."""
    path = pathlib.Path(path)
    given = pretrained.read_config(path)
    try:
        config = config_lib.full_size()
        config.name = "imported"
        config.model.stage_tokens = tuple(int(tokens) for tokens in given["stage_tokens"])
        config.model.update(
            {name: int(given[name]) for name in ("compression_size", "detail_recovery_layers")}
        )
        config.model.audio_padding = given["audio_padding"]
        config.model.lora.update(
            {"rank": int(given["lora_rank"]), "alpha": float(given["lora_alpha"])}
        )
        if not given["lora_rank"]:
            config.trainable = tuple(rule for rule in config.trainable if "lora" not in rule[0])
        audio_config, llm_config = given["audio_config"], given["text_config"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path}/config.json: not as exported ({type(error).__name__}: {error})"
        ) from None
    model = _model(config, audio_config, llm_config, str(path))
    layout = layouts.hf_fastslm(len(config.model.stage_tokens), config.model.detail_recovery_layers)
    source = SafetensorsSource(path)
    leaves = {}
    if strict:
        ignore = pretrained.tied_head(source, layouts.HF_LLM) if model.llm.tied_embeddings else ()
        leaves = engine.open_leaves(source, layout, _shapes(model), ignore, f"{path}/config.json")
        _set_dtypes(config, leaves, given.get("dtype"))
    return Stored("hf", path, config, model, leaves, llm_config, path, source=source, layout=layout)


# --------------------------------------------------------------------------------------------------------------- shared


def _model(config: ConfigDict, whisper_config: dict, llm_config: dict, origin: str) -> FastSLM:
    """The modules, computing in float32."""
    encoder = pretrained.whisper_from_config(whisper_config, origin=origin)
    llm = pretrained.qwen3_from_config(llm_config, lora=LoRA(**config.model.lora), origin=origin)
    options = config.model
    if encoder.width % HEAD_DIM:
        raise ConversionError(
            f"{origin}: the encoder's width {encoder.width} is no multiple of {HEAD_DIM}"
        )
    audio.WindowSpec(padding=options.audio_padding)  # refuses other words
    hfq_former = HFQFormer(
        llm.width,
        tuple(options.stage_tokens),
        options.compression_size,
        options.detail_recovery_layers,
    )
    return FastSLM(encoder, hfq_former, llm, audio_padding=options.audio_padding)


def common_dtype(leaves: Iterable[engine.StoredLeaf]) -> str:
    """The one type of all leaves; float32 where they differ, which holds each of the smaller types exactly."""
    names = {part.dtype.name for leaf in leaves for part in leaf.parts}
    return names.pop() if len(names) == 1 else "float32"


def _set_dtypes(
    config: ConfigDict, leaves: Mapping[str, engine.StoredLeaf], compute: str | None
) -> None:
    """Bases keep the type they have on disk; computation has the type that was said, or bfloat16 for bases of that type."""
    config.model.base_dtype = common_dtype(
        leaf for path, leaf in leaves.items() if experiment.is_base(path)
    )
    config.model.dtype = compute or (
        "bfloat16" if config.model.base_dtype == "bfloat16" else "float32"
    )


@functools.cache
def _shapes(model: FastSLM) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")


def merge_lora(leaves: dict, scale: float) -> dict[str, engine.StoredLeaf | np.ndarray]:
    """Kernels with their LoRA added, layer by layer when asked for; the LoRA leaves are gone."""
    merged = {
        path: leaf for path, leaf in leaves.items() if not path.endswith(("/lora_a", "/lora_b"))
    }
    for path in leaves:
        if not path.endswith("/lora_a"):
            continue
        prefix = path.removesuffix("/lora_a")
        kernel, lora_a, lora_b = (
            leaves[f"{prefix}/kernel"],
            leaves[path],
            leaves[f"{prefix}/lora_b"],
        )

        def read(layer, kernel=kernel, lora_a=lora_a, lora_b=lora_b):
            weight, a, b = (
                engine.part(leaf, layer).astype(np.float32) for leaf in (kernel, lora_a, lora_b)
            )
            return (weight + scale * (a @ b)).astype(kernel.dtype)

        shape = tuple(kernel.shape)
        parts = (
            Tensor(
                f"{prefix}/kernel[{layer}]",
                shape[1:],
                np.dtype(kernel.dtype),
                lambda read=read, layer=layer: read(layer),
            )
            for layer in range(shape[0])
        )
        merged[f"{prefix}/kernel"] = engine.StoredLeaf(shape, tuple(parts), True)
    return merged


def save_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
