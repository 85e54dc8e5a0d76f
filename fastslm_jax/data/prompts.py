"""Prompts and labels: (task, instruction, answer, number of speech tokens) → ids, through the tokenizer's own template."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError

AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
ADDED_TOKENS = (
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    "<|EN|>",
    "<|KO|>",
    *(task.token for task in TASKS.values()),
)
END_OF_TURN = "<|im_end|>"


class PromptError(UserError):
    """A prompt or tokenizer that cannot be used."""


def load_tokenizer(folder: str | os.PathLike, vocab_rows: int | None = None):
    """The tokenizer of a language model's folder, with FastSLM's nine tokens appended in their fixed order.

    Raises:
        PromptError: the folder has no usable tokenizer, or the new ids would pass the model's `vocab_rows` embedding rows.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PromptError(
            f"{folder}: no tokenizer to be read there ({str(error).splitlines()[0]})"
        ) from None
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    if vocab_rows is not None and max(ids) >= vocab_rows:
        raise PromptError(
            f"{folder}: the added tokens reach id {max(ids)}, the model has {vocab_rows} embedding rows"
        )
    if tokenizer.chat_template is None:
        raise PromptError(f"{folder}: the tokenizer has no chat template")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example as ids. `speech_start` is where the speech tokens stand (−1 without audio).

    Example: prompt of 4 ids with audio at 1, 10 speech tokens, answer of 3 ids with its end → tokens [16]:
        tokens      p0 0 0 0 0 0 0 0 0 0 0 p2 p3 a0 a1 <|im_end|>
        loss_mask   1 where the token is to be predicted: a0, a1 and <|im_end|>
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    speech_start: int
    num_speech: int


class PromptTokenizer:
    """Turns examples into ids. Prompts are few, so their ids are kept. Can be pickled, for worker processes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO)
        self.end_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self._prompt_ids: dict[tuple[str | None, str | None], tuple[int, ...]] = {}

    def user_turn(self, task: str | None, instruction: str | None = None) -> str:
        """The user's words. task None: a prompt without audio."""
        if task is None:
            return instruction
        if task not in TASKS:
            raise PromptError(f"task {task!r} is not one of {', '.join(TASKS)}")
        return f"{TASKS[task].token}{AUDIO_BOS}{AUDIO}{AUDIO_EOS}\n{instruction or TASKS[task].instruction}"

    def _encode_prompt(self, task: str | None, instruction: str | None) -> tuple[int, ...]:
        content = self.user_turn(task, instruction)
        if task is None and AUDIO in content:
            raise PromptError(f"a prompt without audio may not hold {AUDIO}")
        if content.count(AUDIO) > 1:
            raise PromptError(f"the instruction may not hold {AUDIO}")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, task: str | None, instruction: str | None = None) -> tuple[int, ...]:
        """Ids of the whole prompt, `<|AUDIO|>` as one id."""
        key = (task, instruction)
        if key not in self._prompt_ids:
            self._prompt_ids[key] = self._encode_prompt(task, instruction)
        return self._prompt_ids[key]

    def answer_ids(self, answer: str | Sequence[str]) -> list[int]:
        """Ids of an answer and its end. The parts of a joined answer are encoded one by one, each after a space, so that their
        counts add up whatever the tokenizer does at the seams (Qwen's and other byte-level ones give the ids of the whole text).
        """
        parts = (
            [answer]
            if isinstance(answer, str)
            else [answer[0], *(f" {part}" for part in answer[1:])]
        )
        return [
            id for ids in self.tokenizer(parts, add_special_tokens=False)["input_ids"] for id in ids
        ] + [self.end_id]

    def answer_length(self, answer: str) -> int:
        """Tokens of an answer without its end."""
        return len(self.answer_ids(answer)) - 1

    def answer_lengths(self, answers: Sequence[str]) -> np.ndarray:
        """Tokens of many answers, without their ends: int64 [answers]."""
        lengths = []
        for start in range(0, len(answers), 10_000):
            batch = self.tokenizer(list(answers[start : start + 10_000]), add_special_tokens=False)
            lengths += [len(ids) for ids in batch["input_ids"]]
        return np.array(lengths, np.int64)

    def fingerprint(self) -> str:
        """Changes when the tokenizer counts otherwise."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(
        self,
        task: str | None,
        instruction: str | None,
        answer: str | Sequence[str] | None,
        num_speech: int,
    ) -> Encoded:
        """The prompt, and its answer (or the parts of a joined one) unless it is None."""
        prompt = np.asarray(self.prompt_ids(task, instruction), np.int32)
        speech_start = -1
        if task is not None:
            speech_start = int(np.flatnonzero(prompt == self.audio_id)[0])
            prompt = np.concatenate(
                [prompt[:speech_start], np.zeros(num_speech, np.int32), prompt[speech_start + 1 :]]
            )
        target = np.asarray([] if answer is None else self.answer_ids(answer), np.int32)
        return Encoded(
            tokens=np.concatenate([prompt, target]),
            loss_mask=np.concatenate([np.zeros(len(prompt), bool), np.ones(len(target), bool)]),
            speech_start=speech_start,
            num_speech=num_speech if task is not None else 0,
        )

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()
