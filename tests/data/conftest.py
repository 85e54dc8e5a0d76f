"""Packed rows of the spoken corpus."""

import pytest

from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows


@pytest.fixture
def make_rows(corpus, prompt_tokenizer, model):
    """make_rows(*sources, shape, seed) → PackedRows; default: the training manifest."""
    prompt_tokenizer = prompt_tokenizer

    def make(
        *sources: MixtureSource,
        shape: RowShape = RowShape(windows=12, tokens=640, labels=384),
        seed: int = 0,
    ) -> PackedRows:
        sources = sources or (MixtureSource(str(corpus / "train.jsonl")),)
        return PackedRows(
            sources, shape, model.window, model.tokens_per_window, prompt_tokenizer, seed
        )

    return make
