"""Cache lengths, rows and positions of requests."""

import jax.numpy as jnp
import pytest

from fastslm_jax.inference.capacity import PREFILL_CHUNK, Capacity, bucketed_length, rows_for


@pytest.mark.parametrize(
    ("positions", "length"),
    [(1, 256), (256, 256), (257, 512), (513, 1024), (5000, 8192), (8193, 9216), (51_000, 53_248)],
)
def test_cache_lengths_are_few(positions, length):
    assert bucketed_length(positions) == length


@pytest.mark.parametrize(
    ("batch_size", "length", "rows"), [(32, 256, 32), (32, 1024, 32), (32, 4096, 8), (4, 8192, 1)]
)
def test_longer_contexts_have_fewer_rows(batch_size, length, rows):
    assert rows_for(batch_size, length) == rows


def test_positions_are_the_prompt_with_its_speech_and_the_answer(model, prompt_tokenizer):
    """Three tokens per window of 1 s replace the audio placeholder."""
    capacity = Capacity(model, prompt_tokenizer, jnp.float32)
    prompt = len(prompt_tokenizer.prompt_ids("asr", "write"))
    assert capacity.positions(5 * 16_000, "asr", "write", 100) == prompt - 1 + 5 * 3 + 100
    text = len(prompt_tokenizer.prompt_ids(None, "hello"))
    assert capacity.positions(None, None, "hello", 5) == text + PREFILL_CHUNK


@pytest.mark.parametrize(
    ("positions", "factor"), [(1000, 1.0), (1001, 2.0), (2000, 2.0), (4000, 4.0)]
)
def test_yarn_factor_by_context_length(model, prompt_tokenizer, positions, factor):
    assert Capacity(model, prompt_tokenizer, jnp.float32, 1000).yarn_factor(positions) == factor
