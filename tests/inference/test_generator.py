"""Generation: the compiled loop with its cache equals plain forward passes, alone or batched."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import devices, memory, sharding
from fastslm_jax.inference import batching, programs, repetition
from fastslm_jax.inference.capacity import PREFILL_CHUNK
from fastslm_jax.inference.generator import Generator, Request
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.lora import LoRA
from fastslm_jax.weights import engine, layouts


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3000, round(16_000 * seconds)).astype(np.int16)


REQUESTS = [
    Request(noise(1.0, 0), "asr", "write", max_new_tokens=20),
    Request(noise(2.7, 1), "ast", "into korean please", max_new_tokens=12),
    Request(noise(0.4, 2), "sqqa", max_new_tokens=16),
]


@pytest.fixture(scope="module")
def generator(model, params, prompt_tokenizer):
    return Generator(model, params, prompt_tokenizer)


@pytest.fixture(scope="module")
def answers(generator):
    return generator.answer(REQUESTS)


def test_separate_layers_give_the_same_answers(model, params, prompt_tokenizer, answers):
    """As on GPUs, also without LoRA (no audio)."""
    unrolled = dataclasses.replace(model, llm=model.llm.clone(scan_layers=False))
    other = Generator(unrolled, programs.separate_layers(params), prompt_tokenizer)
    assert [a.token_ids for a in other.answer(REQUESTS)] == [a.token_ids for a in answers]
    text = [Request(None, "sqqa", "repeat after me", max_new_tokens=4)]
    expected = Generator(model, params, prompt_tokenizer).answer(text)
    assert other.answer(text)[0].token_ids == expected[0].token_ids


def test_tokens_are_those_of_plain_forward_passes(model, params, prompt_tokenizer, answers):
    """Greedy decoding without a cache, by one full forward pass per token."""
    length = 160

    @jax.jit
    def best(speech, tokens, slots, at):
        embeddings = model.splice(params, tokens[None], slots[None], speech)
        hidden, _ = model.llm.apply({"params": params["llm"]}, embeddings, jnp.arange(length)[None])
        return jnp.argmax(model.logits(params, hidden[0, at]))

    speak = jax.jit(model.speech_tokens)
    for request, answer in zip(REQUESTS, answers, strict=True):
        windows, frames = model.window.cut(request.samples)
        slots = np.zeros((1, 4, windows.shape[1]), np.int16)
        slots[0, : len(windows)] = windows
        valid, recording = np.zeros((1, 4), np.int32), np.full((1, 4), -1, np.int32)
        valid[0, : len(windows)], recording[0, : len(windows)] = frames, 0
        speech = speak(params, slots, valid, recording)

        prompt = prompt_tokenizer.encode(request.task, request.instruction, None, 3 * len(windows))
        tokens, speech_slot = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        tokens[: len(prompt.tokens)] = prompt.tokens
        speech_slot[prompt.speech_start : prompt.speech_start + prompt.num_speech] = np.arange(
            prompt.num_speech
        )
        expected = []
        while len(expected) < request.max_new_tokens and prompt_tokenizer.end_id not in expected:
            at = len(prompt.tokens) + len(expected)
            expected.append(int(best(speech, tokens, speech_slot, at - 1)))
            tokens[at] = expected[-1]
        assert [*answer.token_ids, prompt_tokenizer.end_id][: len(expected)] == expected
        assert len(set(expected)) > 3


def test_answers_report_windows_tokens_and_stop_reason(answers, prompt_tokenizer):
    assert [answer.windows for answer in answers] == [1, 3, 1]
    assert [answer.speech_tokens for answer in answers] == [3, 9, 3]
    for answer, request in zip(answers, REQUESTS, strict=True):
        assert answer.text == prompt_tokenizer.decode(answer.token_ids)
        assert prompt_tokenizer.end_id not in answer.token_ids
        is_full = len(answer.token_ids) == request.max_new_tokens
        assert is_full == (answer.stop_reason == "budget")


def test_a_batch_gives_what_each_request_gives_alone(generator, answers):
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert generator.answer([request]) == [answer]


def test_padding_rows_of_a_batch_change_nothing(generator, answers):
    assert generator.answer(REQUESTS[:2], batch_size=3) == answers[:2]


def test_an_answer_ends_with_its_end_token(generator, answers):
    """Declares a token of the first answer the end token: the answer stops before it."""
    ids = answers[0].token_ids
    place = next(i for i in range(1, len(ids)) if ids[i] not in ids[:i])
    ending = Generator(
        generator.model, generator.params, EndsWith(generator.prompt_tokenizer, ids[place])
    )
    (answer,) = ending.answer(REQUESTS[:1])
    assert answer.token_ids == ids[:place]
    assert answer.stop_reason == "eos"


def test_an_answer_ends_with_any_of_several_tokens(generator, answers):
    ids = answers[0].token_ids
    place = next(i for i in range(1, len(ids)) if ids[i] not in ids[:i])
    several = EndsWith(generator.prompt_tokenizer, ids[-1], stop_ids=(0, ids[place]))
    (answer,) = Generator(generator.model, generator.params, several).answer(REQUESTS[:1])
    assert (answer.token_ids, answer.stop_reason) == (ids[:place], "eos")


def test_a_prompt_with_the_names_of_control_tokens(generator):
    """They are text, also in the answer."""
    request = dataclasses.replace(REQUESTS[0], instruction="repeat <|im_end|> and <|AUDIO|>")
    (answer,) = generator.answer([request])
    assert answer.windows == generator.model.window.count(len(request.samples))


@dataclasses.dataclass
class EndsWith:
    """A prompt tokenizer with other end tokens."""

    prompt_tokenizer: object
    end_id: int
    stop_ids: tuple[int, ...] = ()

    @property
    def end_ids(self):
        return (self.end_id, *self.stop_ids)

    def __getattr__(self, name):
        return getattr(self.prompt_tokenizer, name)


def test_text_prompts_are_answered_by_the_base_alone(generator, params, model, prompt_tokenizer):
    request = Request(None, None, "where did anna go", 16)
    (answer,) = generator.answer([request])
    leaves = flatten_dict(params, sep="/")
    base = unflatten_dict(
        {path: leaf for path, leaf in leaves.items() if "/lora_" not in path}, sep="/"
    )
    without_lora = Generator(
        dataclasses.replace(model, llm=model.llm.clone(lora=LoRA())), base, prompt_tokenizer
    )
    assert without_lora.answer([request]) == [answer]
    assert (answer.windows, answer.speech_tokens) == (0, 0)
    doubled = unflatten_dict(
        {path: 2 * leaf if path.endswith("lora_b") else leaf for path, leaf in leaves.items()},
        sep="/",
    )
    assert Generator(model, doubled, prompt_tokenizer).answer([request]) == [answer]


@pytest.fixture(scope="module")
def theirs(model, params):
    """theirs(merged) → Qwen3 of `transformers` with our weights, with or without LoRA merged."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    llm = model.llm

    def build(merged: bool):
        leaves = flatten_dict(params["llm"], sep="/")
        weights = {path: np.asarray(leaf) for path, leaf in leaves.items() if "/lora_" not in path}
        for path in [path for path in weights if merged and path.endswith("/kernel")]:
            a, b = (
                np.asarray(leaves[path.replace("kernel", name)]) for name in ("lora_a", "lora_b")
            )
            weights[path] = weights[path] + llm.lora.scale * a @ b
        config = Qwen3Config(
            vocab_size=llm.vocab_size,
            hidden_size=llm.width,
            intermediate_size=llm.mlp_dim,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_heads,
            num_key_value_heads=llm.num_kv_heads,
            head_dim=llm.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": llm.rope.theta},
            tie_word_embeddings=True,
        )
        theirs = Qwen3ForCausalLM(config).eval()
        tensors = {
            tensor.key: torch.from_numpy(np.array(tensor.read()))
            for tensor in engine.tensors(weights, layouts.hf_decoder())
        }
        missing, unexpected = theirs.load_state_dict(tensors, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])
        theirs.tie_weights()
        return theirs

    return build


def generate(theirs, prompt_tokenizer, request, repetition_penalty=1.0, **inputs):
    """Greedy tokens of `transformers`, up to and without the end token."""
    import torch

    inputs = {name: torch.as_tensor(value)[None] for name, value in inputs.items()}
    with torch.no_grad():
        new = theirs.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=prompt_tokenizer.end_id,
            pad_token_id=0,
            repetition_penalty=repetition_penalty,
        )[0]
    new = new[inputs["input_ids"].shape[1] :] if "input_ids" in inputs else new
    return [int(token) for token in new if token != prompt_tokenizer.end_id]


TEXTS = [
    Request(None, None, "where did anna go", 20),
    Request(None, None, "hi", 30),
    Request(None, None, "a lamp " * 40, 25),
]


def test_answers_with_audio_are_those_of_transformers(theirs, generator, answers, params):
    merged = theirs(merged=True)
    for request, answer in zip(REQUESTS, answers, strict=True):
        (speech,) = generator.encode_speech([request.samples])
        encoded = generator.prompt_tokenizer.encode(
            request.task, request.instruction, None, len(speech)
        )
        embeddings = np.array(np.asarray(params["llm"]["embed_tokens"])[encoded.tokens])
        embeddings[encoded.speech_start : encoded.speech_start + len(speech)] = speech
        found = generate(merged, generator.prompt_tokenizer, request, inputs_embeds=embeddings)
        assert found == list(answer.token_ids)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_answers_without_audio_are_those_of_transformers(
    theirs, model, params, prompt_tokenizer, penalty
):
    """Mixed lengths, the longest in several chunks; the penalty includes the prompt, as there."""
    base = theirs(merged=False)
    generator = Generator(
        model,
        params,
        prompt_tokenizer,
        sampling=SamplingParams(repetition_penalty=penalty),
        detect_repetition=False,
    )
    found = generator.answer(TEXTS)
    for request, answer in zip(TEXTS, found, strict=True):
        ids = list(prompt_tokenizer.prompt_ids(None, request.instruction))
        expected = generate(base, prompt_tokenizer, request, penalty, input_ids=ids)
        assert expected == list(answer.token_ids)
    assert len(prompt_tokenizer.prompt_ids(None, TEXTS[2].instruction)) > 2 * PREFILL_CHUNK


def test_a_prompt_without_audio_has_the_bits_of_the_base(model, params):
    """With LoRA gated off, logits equal those of a model without LoRA bit by bit."""
    leaves = flatten_dict(params["llm"], sep="/")
    base = unflatten_dict(
        {path: leaf for path, leaf in leaves.items() if "/lora_" not in path}, sep="/"
    )
    tokens = np.random.default_rng(0).integers(0, 300, (2, 40))
    positions = np.broadcast_to(np.arange(40), tokens.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(llm, params, gate):
        embeddings = llm.apply({"params": params}, tokens, method="embed")
        hidden, _ = llm.apply({"params": params}, embeddings, positions, lora_gate=gate)
        return llm.apply({"params": params}, hidden, method="logits")

    plain = np.asarray(logits(model.llm.clone(lora=LoRA()), base, None))
    np.testing.assert_array_equal(logits(model.llm, params["llm"], jnp.zeros((2, 1))), plain)
    assert not np.array_equal(logits(model.llm, params["llm"], jnp.ones((2, 1))), plain)


LONG = 700  # tokens: more than a block of the cache, and no multiple of any chunk


@pytest.fixture(scope="module")
def long_prompt(model):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 300, LONG).astype(np.int32)
    return batching.Prompt(
        tokens, rng.normal(0, 1, (90, model.llm.width)).astype(np.float32), 550, 8
    )


def next_logits(generator, prompt, chunks):
    """Logits after a prompt that is prefilled in the default chunks (None) or in given ones."""
    model, params = generator.model, generator.params
    batch = batching.ContinuousBatch(
        model,
        params,
        rows=2,
        cache_length=1024,
        cache_dtype=generator.capacity.cache_dtype,
        sampling=SamplingParams(),
        end_ids=[],
        detect_repetition=False,
        mesh=None,
    )
    batch.running[1] = batching.Running(1, 0, prompt)
    if chunks is None:
        batch._new = [1]
        batch._prefill()
    else:
        start = 0
        for length in chunks:
            batch.cache = batch._prefill_chunk([1], [start], length)
            start += length
    return np.asarray(last_logits(model, params, batch.cache, prompt.tokens[-1:]))[0]


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model, params, cache, token):
    variables = {"params": params["llm"]}
    embedding = model.llm.apply(variables, token[None], method="embed")
    hidden, _ = model.llm.apply(
        variables, embedding, jnp.full((1, 1), LONG - 1), cache=cache.replace(rows=jnp.array([1]))
    )
    return model.logits(params, hidden[:, 0])


@pytest.fixture(scope="module")
def whole_logits(model, params, long_prompt):
    """Logits of one forward pass without a cache."""
    embeddings = np.array(np.asarray(params["llm"]["embed_tokens"])[long_prompt.tokens])
    embeddings[550:640] = long_prompt.speech

    @jax.jit
    def run(embeddings):
        hidden, _ = model.llm.apply({"params": params["llm"]}, embeddings, jnp.arange(LONG)[None])
        return model.logits(params, hidden[0, -1])

    return np.asarray(run(embeddings[None]))


def test_prefill_in_chunks_equals_prefill_as_a_whole(generator, long_prompt, whole_logits):
    scale = np.abs(whole_logits).max()
    assert (
        np.abs(next_logits(generator, long_prompt, [LONG - 1]) - whole_logits).max() < 1e-5 * scale
    )
    assert np.abs(next_logits(generator, long_prompt, None) - whole_logits).max() < 1e-5 * scale


def test_an_int8_cache_changes_logits_by_less_than_a_hundredth(
    model, params, prompt_tokenizer, long_prompt, whole_logits
):
    generator = Generator(model, params, prompt_tokenizer, cache_dtype=jnp.int8)
    difference = (
        np.abs(next_logits(generator, long_prompt, None) - whole_logits).max()
        / np.abs(whole_logits).max()
    )
    assert 1e-5 < difference < 0.01
    assert generator.capacity.cache_bytes(1, 1024) == 2 * 2 * 1024 * 2 * (16 + 4)


def test_rows_that_are_done_take_the_next_request(generator):
    requests = [Request(noise(0.5 + 0.3 * i, i), "asr", "write", 3 + 5 * (i % 4)) for i in range(9)]
    together = generator.answer(requests, batch_size=2)
    assert [len(a.token_ids) if a.stop_reason == "budget" else 0 for a in together][:2] == [3, 8]
    for request, answer in zip(requests, together, strict=True):
        assert generator.answer([request], batch_size=2) == [answer]
    assert all(answer.first_token_seconds > 0 for answer in together)


def test_fifty_lengths_share_a_handful_of_programs(model, params, prompt_tokenizer, monkeypatch):
    """0.5 to 25 s, prompts in chunks of both sizes: nothing is compiled after a first pass."""
    monkeypatch.setattr(batching, "LONG_CHUNK", 80)
    generator = Generator(model, params, prompt_tokenizer, window_batch=4)
    lengths = [0.5 + 0.5 * i for i in range(50)]
    before = devices.compiled_so_far()
    first = [Request(noise(seconds, 1), max_new_tokens=8) for seconds in (0.5, 2.5, 25.0)]
    generator.answer(first, batch_size=4)
    assert (devices.compiled_so_far() - before).programs <= 8
    before = devices.compiled_so_far()
    requests = [Request(noise(seconds, 1), max_new_tokens=8) for seconds in lengths]
    answers = generator.answer(requests, batch_size=4)
    assert [answer.windows for answer in answers] == [
        max(1, -(-int(100 * seconds) // 100)) for seconds in lengths
    ]
    assert (devices.compiled_so_far() - before).programs == 0


def test_micro_batches_do_not_change_speech_tokens(model, params, prompt_tokenizer, generator):
    """The second half is 60 dB quieter, and log-mel is floored by the maximum of the first."""
    samples = noise(7.3, 5)
    samples[len(samples) // 2 :] //= 1000
    (together,) = generator.encode_speech([samples])
    (apart,) = Generator(model, params, prompt_tokenizer, window_batch=2).encode_speech([samples])
    np.testing.assert_allclose(apart, together, atol=1e-5 * np.abs(together).max())
    assert together.shape == (8 * 3, 32)


def test_a_mesh_gives_the_answers_of_one_device(model, params, prompt_tokenizer, answers):
    """Rows over data and fsdp, heads over tensor."""
    mesh = sharding.make_mesh(2, 2, 2)
    leaves = flatten_dict(params, sep="/")
    placed = sharding.parameter_shardings(leaves, mesh)
    spread = unflatten_dict(
        {path: jax.device_put(leaf, placed[path]) for path, leaf in leaves.items()}, sep="/"
    )
    generator = Generator(model, spread, prompt_tokenizer)
    assert generator.mesh == mesh
    assert generator.answer(REQUESTS) == answers


def test_partial_answers_grow_into_the_whole(generator, answers):
    seen = {i: [] for i in range(3)}
    for i, answer in generator.stream(REQUESTS, partial=True):
        seen[i].append(answer)
    for i, answer in enumerate(answers):
        assert seen[i][-1] == answer
        assert len(seen[i]) > 1
        assert all(partial.stop_reason is None for partial in seen[i][:-1])
        ids = [partial.token_ids for partial in seen[i]]
        assert all(later[: len(sooner)] == sooner for sooner, later in itertools.pairwise(ids))


def test_a_seed_gives_the_same_answers_in_any_batch(model, params, prompt_tokenizer):
    def answer(seed, requests):
        sampling = SamplingParams(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return Generator(model, params, prompt_tokenizer, sampling=sampling).answer(
            requests, batch_size=4
        )

    assert answer(1, REQUESTS)[:1] == answer(1, REQUESTS[:1])
    assert answer(1, REQUESTS) != answer(2, REQUESTS)


def test_a_loop_is_stopped_and_its_repetitions_are_cut(model, params, prompt_tokenizer):
    """A random model falls into a loop within 400 greedy tokens."""
    request = dataclasses.replace(TEXTS[1], max_new_tokens=400)
    (looped,) = Generator(model, params, prompt_tokenizer).answer([request])
    (whole,) = Generator(model, params, prompt_tokenizer, detect_repetition=False).answer([request])
    assert looped.stop_reason == "loop"
    assert looped.token_ids == whole.token_ids[: len(looped.token_ids)]
    assert len(looped.token_ids) < len(whole.token_ids) == 400
    ends = range(len(looped.token_ids) + repetition.MIN_TOKENS, 400)
    assert any(
        repetition.without_repeats(whole.token_ids[:end]) == looped.token_ids for end in ends
    )


def test_yarn_beyond_the_native_context(model, params, prompt_tokenizer, generator):
    request = TEXTS[2]
    native = len(prompt_tokenizer.prompt_ids(None, request.instruction)) // 2
    stretched = Generator(model, params, prompt_tokenizer, native_positions=native).answer(
        [request]
    )
    scaling = {"kind": "yarn", "factor": 4.0, "original_max_positions": native}
    rope = dataclasses.replace(model.llm.rope, **scaling)
    by_hand = dataclasses.replace(model, llm=model.llm.clone(rope=rope))
    assert stretched == Generator(by_hand, params, prompt_tokenizer).answer([request])
    assert stretched != generator.answer([request])


def test_requests_that_do_not_fit_are_rejected_before_any_work(
    model, params, prompt_tokenizer, monkeypatch
):
    request = Request(noise(30.0, 0), max_new_tokens=64)
    small = Generator(model, params, prompt_tokenizer, native_positions=50)
    monkeypatch.setattr(small, "encode_speech", None)
    message = (
        r"positions \(speech, prompt and answer\) are needed but the language model supports 200"
    )
    with pytest.raises(memory.CapacityError, match=message):
        small.answer([request])
    monkeypatch.setattr(memory, "free_bytes", lambda: 2**20)
    full = Generator(model, params, prompt_tokenizer)
    monkeypatch.setattr(full, "encode_speech", None)
    message = (
        r"\(key-value cache .*\), but only 0.00 GiB is available; use --kv_cache=int8, or lower"
    )
    with pytest.raises(memory.CapacityError, match=message):
        full.answer([dataclasses.replace(request, max_new_tokens=20_000)])


@pytest.mark.parametrize(
    "samples",
    [1600, 16_000 - 1, 16_000, 16_000 + 1, 30 * 16_000 - 1, 30 * 16_000, 30 * 16_000 + 160],
)
def test_any_length_is_answered(generator, samples):
    request = Request(noise(samples / 16_000, 0), max_new_tokens=4)
    (answer,) = generator.answer([request], cache_length=256)
    assert answer.windows == max(1, -(-(samples // 160) // 100))
    assert answer.speech_tokens == 3 * answer.windows
    assert len(answer.token_ids) == 4 or answer.stop_reason == "eos"


def test_an_hour_is_encoded_with_one_shape(model, params, prompt_tokenizer, monkeypatch):
    """All calls of the encoder have the same shape, so its memory does not depend on the length."""
    encode, shapes = programs.encode, set()

    def noted(model, params, windows, *rest, **options):
        shapes.add(windows.shape)
        return encode(model, params, windows, *rest, **options)

    monkeypatch.setattr(programs, "encode", noted)
    generator = Generator(model, params, prompt_tokenizer)
    (speech,) = generator.encode_speech([np.resize(noise(60, 0), 3600 * 16_000)])
    assert speech.shape == (3600 * 3, 32)
    assert len(shapes) == 1
