"""Prompts and labels: (task, instruction, answer, number of speech tokens) → token ids."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
_TOKENIZER_BATCH = 10_000  # texts per call of the tokenizer
_CACHED_PROMPTS = 1024  # a server sees ever new ones


class PromptError(UserError):
    """A prompt or tokenizer cannot be used."""


def load_tokenizer(
    folder: str | os.PathLike, vocab_rows: int | None = None
) -> "PreTrainedTokenizerFast":
    """Loads a language model's tokenizer and appends FastSLM's nine tokens in a fixed order.

    Args:
        folder: the language model's folder.
        vocab_rows: rows of the model's embedding table (None: not checked).

    Raises:
        PromptError: the folder has no usable tokenizer, or the new ids exceed the embedding table.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PromptError(
            f"{folder}: cannot load a tokenizer ({str(error).splitlines()[0]})"
        ) from None
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    if vocab_rows is not None and max(ids) >= vocab_rows:
        raise PromptError(
            f"{folder}: the added tokens reach id {max(ids)}, but the model has only {vocab_rows} "
            "embedding rows"
        )
    if tokenizer.chat_template is None:
        raise PromptError(f"{folder}: the tokenizer has no chat template")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The token ids of one example.

    Example: a prompt of 4 ids with <|AUDIO|> at position 1, 10 speech tokens, and an answer of 2
    ids:
        tokens      p0 0 0 0 0 0 0 0 0 0 0 p2 p3 a0 a1 <|im_end|>
        loss_mask   1 at a0, a1 and <|im_end|>

    Attributes:
        tokens: [n] int32, 0 at speech tokens.
        loss_mask: [n] bool, True where the model learns to predict the token.
        speech_start: position of the first speech token (-1: no audio).
        num_speech: number of speech tokens.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    speech_start: int
    num_speech: int


class PromptTokenizer:
    """Converts examples to token ids with the tokenizer's chat template.

    Prompt ids are cached. Instances can be pickled for worker processes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO)
        self.end_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self._prompt_ids: dict[tuple[str | None, str | None], tuple[int, ...]] = {}

    def user_turn(self, task: str | None, instruction: str | None = None) -> str:
        """The content of the user turn.

        Args:
            task: a key of TASKS, or None for a prompt without audio.
            instruction: None: the task's default instruction.
        """
        if task is None:
            return instruction
        if task not in TASKS:
            raise PromptError(f"task {task!r} is not one of {', '.join(TASKS)}")
        instruction = instruction or TASKS[task].instruction
        return f"{TASKS[task].token}{AUDIO_BOS}{AUDIO}{AUDIO_EOS}\n{instruction}"

    def _encode_prompt(self, task: str | None, instruction: str | None) -> tuple[int, ...]:
        content = self.user_turn(task, instruction)
        if task is None and AUDIO in content:
            raise PromptError(f"a prompt without audio must not contain {AUDIO}")
        if content.count(AUDIO) > 1:
            raise PromptError(f"the instruction must not contain {AUDIO}")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, task: str | None, instruction: str | None = None) -> tuple[int, ...]:
        """Ids of the whole prompt, with `<|AUDIO|>` as a single id."""
        key = (task, instruction)
        if key not in self._prompt_ids:
            if len(self._prompt_ids) == _CACHED_PROMPTS:
                self._prompt_ids.clear()
            self._prompt_ids[key] = self._encode_prompt(task, instruction)
        return self._prompt_ids[key]

    def answer_ids(self, answer: str | Sequence[str]) -> list[int]:
        """Ids of an answer and the end-of-turn token.

        The parts of a joined answer are encoded separately, each after a space, so that their
        lengths add up. (Qwen's and other byte-level tokenizers give the ids of the whole text.)
        """
        if isinstance(answer, str):
            answer = [answer]
        parts = [answer[0], *(f" {part}" for part in answer[1:])]
        ids_of_parts = self.tokenizer(parts, add_special_tokens=False)["input_ids"]
        return [*(id for ids in ids_of_parts for id in ids), self.end_id]

    def answer_length(self, answer: str) -> int:
        """Number of tokens of an answer, without the end-of-turn token."""
        return len(self.answer_ids(answer)) - 1

    def answer_lengths(self, answers: Sequence[str]) -> np.ndarray:
        """Number of tokens of every answer, without the end-of-turn token: int64 [answers]."""
        lengths = []
        for start in range(0, len(answers), _TOKENIZER_BATCH):
            texts = list(answers[start : start + _TOKENIZER_BATCH])
            ids_of_texts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            lengths += [len(ids) for ids in ids_of_texts]
        return np.array(lengths, np.int64)

    def fingerprint(self) -> str:
        """A hash of the tokenizer: equal fingerprints mean equal token counts."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(
        self,
        task: str | None,
        instruction: str | None,
        answer: str | Sequence[str] | None,
        num_speech: int,
    ) -> Encoded:
        """Encodes an example.

        Args:
            task: a key of TASKS, or None for a prompt without audio.
            instruction: None: the task's default instruction.
            answer: the answer, or the parts of a joined answer (None: encode only the prompt).
            num_speech: number of speech tokens that replace `<|AUDIO|>`.
        """
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

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()
