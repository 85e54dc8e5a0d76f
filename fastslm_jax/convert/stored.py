"""A FastSLM on disk in any format: its config, its model, and its parameters, read on demand."""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from fastslm_jax.convert.merging import merge_lora
from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA
from fastslm_jax.training import experiment
from fastslm_jax.weights import engine
from fastslm_jax.weights.tensors import TensorSource

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Stored:
    """An opened FastSLM.

    Attributes:
        kind: "workdir", "released" or "hf".
        leaves: {path: leaf} for every parameter, in the dtype on disk. Empty if opened with
            strict=False.
        llm_config: config.json of the language model.
        tokenizer: folder of the tokenizer.
        step, meta: of the checkpoint of a working directory.
        source, layout: all tensors and their names, for formats with one weight file.
    """

    kind: str
    path: pathlib.Path
    config: ConfigDict
    model: FastSLM
    leaves: dict[str, engine.Leaf]
    llm_config: dict
    tokenizer: pathlib.Path
    step: int = 0
    meta: dict = dataclasses.field(default_factory=dict)
    source: TensorSource | None = None
    layout: engine.Layout | None = None

    @property
    def has_lora(self) -> bool:
        return self.model.llm.lora.rank > 0

    @property
    def whisper_config(self) -> dict:
        """The config.json of the encoder as a Hugging Face Whisper."""
        encoder = self.model.encoder
        return {
            "model_type": "whisper",
            "d_model": encoder.width,
            "encoder_layers": encoder.num_layers,
            "encoder_attention_heads": encoder.num_heads,
            "encoder_ffn_dim": encoder.mlp_dim,
            "num_mel_bins": encoder.num_mels,
            "max_source_positions": encoder.max_positions,
            "activation_function": "gelu",
        }

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        chat_template = self.config.model.chat_template
        return prompts.load_tokenizer(
            self.tokenizer, self.model.llm.vocab_size, chat_template=chat_template
        )

    def original_dtype(self, path: str) -> np.dtype | None:
        """The dtype of a parameter in the file that a working directory was imported from."""
        name = self.meta.get("imported", {}).get("dtypes", {}).get(path)
        return None if name is None else np.dtype(getattr(ml_dtypes, name, name))

    def merged(self) -> "Stored":
        """The same model with LoRA merged into the weights."""
        if not self.has_lora:
            return self
        config = self.config.copy_and_resolve_references()
        config.model.lora.rank = 0
        return dataclasses.replace(
            self,
            config=config,
            model=dataclasses.replace(self.model, llm=self.model.llm.clone(lora=LoRA())),
            leaves=merge_lora(self.leaves, self.model.llm.lora.scale),
        )


def param_shapes(model: FastSLM) -> dict[str, jax.ShapeDtypeStruct]:
    return experiment.abstract_params(model, jnp.float32)


def check_adapter(given: Stored, layout: str) -> None:
    """Raises UserError if a layout, "hf" or "released", cannot hold the adapter of a model."""
    only_in_hf = {"downsample_factor": 2, "compressor_projections": False}
    required = {"adapter": "hfq"} | (only_in_hf if layout == "released" else {})
    for name, value in required.items():
        found = given.config.model[name]
        if found != value:
            raise UserError(
                f"{given.path}: config.model.{name} is {found} and --layout={layout} has {value} "
                f"only{'; use --layout=hf' if name in only_in_hf else ''}"
            )


def common_dtype(leaves: Iterable[engine.StoredLeaf]) -> str:
    """The dtype of all leaves, or float32 if they differ."""
    names = {part.dtype.name for leaf in leaves for part in leaf.parts}
    return names.pop() if len(names) == 1 else "float32"


def set_dtypes(
    config: ConfigDict, leaves: Mapping[str, engine.StoredLeaf], compute: str | None
) -> None:
    """Sets config.model.base_dtype to the dtype on disk, and dtype to `compute`.

    By default, computation is in bfloat16 if the pretrained weights are, and else in float32.
    """
    base_dtype = common_dtype(leaf for path, leaf in leaves.items() if experiment.is_base(path))
    base_dtype = "float32" if base_dtype == "float64" else base_dtype  # JAX's largest
    config.model.base_dtype = base_dtype
    config.model.dtype = compute or ("bfloat16" if base_dtype == "bfloat16" else "float32")


def write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
