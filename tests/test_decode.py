"""Generation: the compiled loop with its cache gives what plain forward passes give, alone or in a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import decode
from fastslm_jax.decode import Generator, Request
from fastslm_jax.models.lora import LoRA


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3000, round(16_000 * seconds)).astype(np.int16)


REQUESTS = [
    Request(noise(1.0, 0), "asr", "write"),
    Request(noise(2.7, 1), "ast", "into korean please"),
    Request(noise(0.4, 2), "sqqa"),
]
BUDGETS = [20, 12, 16]


@pytest.fixture(scope="module")
def generator(model, params, encoder):
    return Generator(model, params, encoder)


@pytest.fixture(scope="module")
def answers(generator):
    return generator.answer(REQUESTS, BUDGETS)


@pytest.mark.parametrize(
    ("windows", "bucket"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (17, 24), (25, 32), (960, 1024)]
)
def test_recordings_are_padded_to_few_lengths(windows, bucket):
    assert decode.window_bucket(windows) == bucket


def test_tokens_are_those_of_plain_forward_passes(model, params, encoder, answers):
    """No cache: every token takes a forward pass over all before it, and the best one is appended."""
    length = 160

    @jax.jit
    def best(speech, tokens, slots, at):
        embeddings = model.splice(params, tokens[None], slots[None], speech)
        hidden, _ = model.llm.apply({"params": params["llm"]}, embeddings, jnp.arange(length)[None])
        return jnp.argmax(model.logits(params, hidden[0, at]))

    speak = jax.jit(model.speech_tokens)
    for request, budget, answer in zip(REQUESTS, BUDGETS, answers, strict=True):
        windows, frames = model.window.cut(request.samples)
        slots = np.zeros((1, 4, windows.shape[1]), np.int16)
        slots[0, : len(windows)] = windows
        valid, recording = np.zeros((1, 4), np.int32), np.full((1, 4), -1, np.int32)
        valid[0, : len(windows)], recording[0, : len(windows)] = frames, 0
        speech = speak(params, slots, valid, recording)

        prompt = encoder.encode(request.task, request.instruction, None, 3 * len(windows))
        tokens, speech_slot = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        tokens[: len(prompt.tokens)] = prompt.tokens
        speech_slot[prompt.speech_start : prompt.speech_start + prompt.num_speech] = np.arange(prompt.num_speech)
        expected = []
        while len(expected) < budget and encoder.end_id not in expected:
            at = len(prompt.tokens) + len(expected)
            expected.append(int(best(speech, tokens, speech_slot, at - 1)))
            tokens[at] = expected[-1]
        assert [*answer.token_ids, encoder.end_id][: len(expected)] == expected
        assert len(set(expected)) > 3


def test_answers_say_how_they_came_about(answers, encoder):
    assert [answer.windows for answer in answers] == [1, 3, 1]
    assert [answer.speech_tokens for answer in answers] == [3, 9, 3]
    for answer, budget in zip(answers, BUDGETS, strict=True):
        assert answer.text == encoder.decode(answer.token_ids)
        assert encoder.end_id not in answer.token_ids
        assert len(answer.token_ids) == budget if answer.stop_reason == "budget" else len(answer.token_ids) < budget


def test_a_batch_gives_what_each_request_gives_alone(generator, answers):
    for request, budget, answer in zip(REQUESTS, BUDGETS, answers, strict=True):
        assert generator.answer([request], [budget]) == [answer]


def test_padding_rows_of_a_batch_change_nothing(generator, answers):
    assert generator.answer(REQUESTS[:2], BUDGETS[:2], batch_size=3) == answers[:2]


def test_an_answer_ends_with_its_end_token(generator, answers):
    """The third token of the first answer, declared the end: it and all behind it are cut."""
    end = answers[0].token_ids[2]
    assert end not in answers[0].token_ids[:2]
    ending = Generator(generator.model, generator.params, EndsWith(generator.encoder, end))
    (answer,) = ending.answer(REQUESTS[:1], BUDGETS[:1])
    assert answer.token_ids == answers[0].token_ids[:2]
    assert answer.stop_reason == "eos"


@dataclasses.dataclass
class EndsWith:
    """A prompt encoder with another end token."""

    encoder: object
    end_id: int

    def __getattr__(self, name):
        return getattr(self.encoder, name)


def test_text_prompts_are_answered_by_the_base_alone(generator, params, model, encoder):
    request = Request(None, None, "where did anna go")
    (answer,) = generator.answer([request], [16])
    leaves = flatten_dict(params, sep="/")
    base = unflatten_dict({path: leaf for path, leaf in leaves.items() if "/lora_" not in path}, sep="/")
    without_lora = Generator(dataclasses.replace(model, llm=model.llm.clone(lora=LoRA())), base, encoder)
    assert without_lora.answer([request], [16]) == [answer]
    assert (answer.windows, answer.speech_tokens) == (0, 0)
    doubled = unflatten_dict({path: 2 * leaf if path.endswith("lora_b") else leaf for path, leaf in leaves.items()}, sep="/")
    assert Generator(model, doubled, encoder).answer([request], [16]) == [answer]
