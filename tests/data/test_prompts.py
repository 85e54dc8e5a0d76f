"""Prompts and labels: added tokens, chat template, positions of speech tokens, and loss mask."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastslm_jax.data import prompts

PROMPT = (
    "<|im_start|>user\n<|ASR|><|audio_bos|><|AUDIO|><|audio_eos|>\nwrite<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_nine_tokens_are_appended_in_a_fixed_order(tokenizer_folder):
    before = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    tokenizer = prompts.load_tokenizer(tokenizer_folder)
    ids = tokenizer.convert_tokens_to_ids(
        [
            "<|AUDIO|>",
            "<|audio_bos|>",
            "<|audio_eos|>",
            "<|EN|>",
            "<|KO|>",
            "<|ASR|>",
            "<|AST|>",
            "<|SSUM|>",
            "<|SQQA|>",
        ]
    )
    assert ids == list(range(before, before + 9))
    assert len(tokenizer) == before + 9


def test_a_prompt_with_audio_and_an_answer(prompt_tokenizer):
    """<|AUDIO|> becomes six speech tokens; only the answer and <|im_end|> are in the loss."""
    tokenizer = prompt_tokenizer.tokenizer
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    at = ids.index(tokenizer.convert_tokens_to_ids("<|AUDIO|>"))
    answer = tokenizer("anna bought eggs", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1  # of the user's turn

    encoded = prompt_tokenizer.encode("asr", "write", "anna bought eggs", num_speech=6)
    assert encoded.tokens.tolist() == ids[:at] + [0] * 6 + ids[at + 1 :] + answer + [end]
    assert encoded.loss_mask.tolist() == [False] * (len(ids) + 5) + [True] * (len(answer) + 1)
    assert (encoded.speech_start, encoded.num_speech) == (at, 6)
    assert tokenizer.decode(ids) == PROMPT


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("asr", "<|ASR|><|audio_bos|><|AUDIO|><|audio_eos|>\nTranscribe the audio clip into text."),
        (
            "ast",
            "<|AST|><|audio_bos|><|AUDIO|><|audio_eos|>\nTranslate the audio clip into Korean.",
        ),
        ("ssum", "<|SSUM|><|audio_bos|><|AUDIO|><|audio_eos|>\nSummarize the audio clip."),
        (
            "sqqa",
            "<|SQQA|><|audio_bos|><|AUDIO|><|audio_eos|>\nAnswer the question in the audio clip.",
        ),
    ],
)
def test_default_instructions(prompt_tokenizer, task, content):
    assert prompt_tokenizer.user_turn(task) == content


def test_the_answer_of_a_clip_without_speech_is_the_end_of_turn(prompt_tokenizer):
    """Joined with other answers, it adds nothing, also no space."""
    assert prompt_tokenizer.answer_ids("") == [prompt_tokenizer.end_id]
    assert prompt_tokenizer.encode("asr", None, "", num_speech=3).loss_mask.sum() == 1
    both = prompt_tokenizer.answer_ids(["one", "two"])
    assert prompt_tokenizer.decode(both) == "one two"
    for answers in (["", "one", "two"], ["one", "", "", "two"], ["one", "two", ""]):
        assert prompt_tokenizer.answer_ids(answers) == both
    assert (prompts.joined("two"), prompts.joined("")) == (" two", "")


def test_prompts_without_an_answer_or_without_audio(prompt_tokenizer):
    prompt = prompt_tokenizer.encode("asr", "write", None, num_speech=6)
    assert len(prompt.tokens) == len(prompt_tokenizer.prompt_ids("asr", "write")) + 5
    assert not prompt.loss_mask.any()
    text = prompt_tokenizer.encode(None, "say hello", "hello", num_speech=0)
    expected = "<|im_start|>user\nsay hello<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    assert prompt_tokenizer.tokenizer.decode(text.tokens) == expected
    assert (text.speech_start, text.num_speech) == (-1, 0)


def test_answers_are_decoded_to_text(prompt_tokenizer):
    ids = prompt_tokenizer.answer_ids("안녕하세요 anna")
    assert ids[-1] == prompt_tokenizer.end_id
    assert prompt_tokenizer.decode(np.array(ids)) == "안녕하세요 anna"


def test_invalid_prompts(prompt_tokenizer):
    with pytest.raises(prompts.PromptError, match="task 'vqa' is not one of asr, ast, ssum, sqqa"):
        prompt_tokenizer.prompt_ids("vqa")
    with pytest.raises(prompts.PromptError, match=r"the instruction must not contain <\|AUDIO\|>"):
        prompt_tokenizer.prompt_ids("asr", "repeat <|AUDIO|>")
    with pytest.raises(
        prompts.PromptError, match=r"a prompt without audio must not contain <\|AUDIO\|>"
    ):
        prompt_tokenizer.prompt_ids(None, "what is <|AUDIO|>?")


def test_unusable_tokenizers(tokenizer_folder, tmp_path):
    with pytest.raises(prompts.PromptError, match=f"{tmp_path}: cannot load a tokenizer"):
        prompts.load_tokenizer(tmp_path)
    with pytest.raises(
        prompts.PromptError, match="the added tokens reach id 308, but the model has only 305"
    ):
        prompts.load_tokenizer(tokenizer_folder, vocab_rows=305)
    plain = AutoTokenizer.from_pretrained(tokenizer_folder)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(prompts.PromptError, match="the tokenizer has no chat template"):
        prompts.load_tokenizer(tmp_path / "plain")


def test_a_joined_answer_has_the_ids_of_the_whole_text(prompt_tokenizer):
    parts = ["anna bought two red lamps.", "in vienna, on friday", "7 o'clock", "안녕하세요"]
    assert prompt_tokenizer.answer_ids(parts) == prompt_tokenizer.answer_ids(" ".join(parts))
    lengths = [
        *prompt_tokenizer.answer_lengths(parts[:1]),
        *prompt_tokenizer.answer_lengths([f" {part}" for part in parts[1:]]),
    ]
    assert sum(lengths) + 1 == len(prompt_tokenizer.answer_ids(parts))


def test_fingerprints_identify_tokenizers(prompt_tokenizer, tokenizer_folder):
    same = prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer_folder))
    assert same.fingerprint() == prompt_tokenizer.fingerprint()
    same.tokenizer.add_tokens(["<|more|>"])
    assert same.fingerprint() != prompt_tokenizer.fingerprint()
