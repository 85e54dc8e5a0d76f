"""A server with the tiny model (windows of 1 s, trained on 10 s)."""

import pytest
from running_server import running

from fastslm_jax.inference import api
from fastslm_jax.inference.generator import Generator


@pytest.fixture(scope="session")
def loaded(model, params, prompt_tokenizer) -> api.Model:
    """Answers end after their budget, or sooner with an end token."""
    return api.Model(Generator(model, params, prompt_tokenizer, detect_repetition=False), 10.0)


@pytest.fixture(scope="session")
def server(loaded):
    with running(loaded) as found:
        yield found
