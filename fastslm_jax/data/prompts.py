"""Prompts and labels: (task, instruction, answer, number of speech tokens) → token ids."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastslm_jax import schema
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
CHAT_TEMPLATES = {  # for tokenizers without one: config.model.chat_template
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}
_PROBE = "Hello, 12 lamps."  # a text that every tokenizer and chat template must keep
_SHIELD = "\ue000"  # a private-use character, which makes the name of a control token plain text
_TOKENIZER_BATCH = 10_000  # texts per call of the tokenizer
_CACHED_PROMPTS = 1024  # a server sees ever new ones


class PromptError(UserError):
    """A prompt or tokenizer cannot be used."""


class GenerationConfig(schema.Schema):
    """What is read from generation_config.json, or from config.json in its place."""

    eos_token_id: int | list[int] | None = None


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((pathlib.Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def num_ids(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest id of a tokenizer plus 1: the embedding rows that it needs."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(
    folder: str | os.PathLike, vocab_rows: int | None = None, *, chat_template: str = ""
) -> "PreTrainedTokenizerFast":
    """Loads a language model's tokenizer and appends FastSLM's nine tokens in a fixed order.

    Args:
        folder: the language model's folder.
        vocab_rows: rows of the model's embedding table (None: not checked).
        chat_template: a key of CHAT_TEMPLATES; "" for the tokenizer's own.

    Raises:
        PromptError: the folder has no usable tokenizer, chat template and end of turn, or the ids
            exceed the embedding table.
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(folder)
    if not has_tokenizer(folder):
        raise PromptError(
            f"{folder}: cannot load a tokenizer (no tokenizer.json); copy the model's files there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
        tokens = tokenizer.get_vocab()
        again = tokenizer.decode(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    except Exception as error:  # a damaged file can raise almost any type
        raise PromptError(
            f"{folder}: cannot load a tokenizer ({_reason(error)}); copy it again"
        ) from None
    if not tokenizer.is_fast:
        raise PromptError(f"{folder}: the tokenizer has no tokenizer.json, which is required")
    missing = [token for token in ADDED_TOKENS if token not in tokens]
    if missing:
        raise PromptError(f"{folder}: the tokenizer has no token {missing[0]}")
    if again.strip() != _PROBE:
        raise PromptError(f"{folder}: the tokenizer turns {_PROBE!r} into {_shown(again)}")
    largest = max(tokens.values())
    if vocab_rows is not None and largest >= vocab_rows:
        raise PromptError(
            f"{folder}: the added tokens reach id {largest}, but the model has only {vocab_rows} "
            "embedding rows"
        )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATES[chat_template]
    if not tokenizer.chat_template:
        raise PromptError(
            f"{folder}: the tokenizer has no chat template; set config.model.chat_template to "
            f"{' or '.join(CHAT_TEMPLATES)}, or add a chat_template.jinja"
        )
    _apply_template(tokenizer, _PROBE)  # these raise now if they are unusable
    _end_of_turn(tokenizer)
    _stop_ids(tokenizer)
    return tokenizer


def _end_of_turn(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The id that ends an answer: that in the chat template, or else the tokenizer's eos_token."""
    chat = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE[::-1]}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template for questions only
        text = ""
    after = text.partition(_PROBE[::-1])[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    end = next((i for i in ids if i in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)
    if end is None:
        raise PromptError(
            f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer has a token "
            "for the end of a turn; set eos_token in tokenizer_config.json"
        )
    return end


def _stop_ids(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """The ids that end a text: the tokenizer's eos_token, and those of generation_config.json."""
    found = {tokenizer.eos_token_id} - {None}
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(tokenizer.name_or_path) / name
        if not path.is_file():
            continue
        try:
            fields = schema.parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise PromptError(f"{path}: {error}") from None
        ids = schema.check(GenerationConfig, fields, path, PromptError).eos_token_id
        return found | set([ids] if isinstance(ids, int) else ids or [])
    return found


def _apply_template(tokenizer: "PreTrainedTokenizerFast", content: str) -> str:
    """A chat of one user turn as text, up to the answer.

    Raises:
        PromptError: the chat template is broken, or changes the content of the turn.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program
        raise PromptError(
            f"{tokenizer.name_or_path}: the chat template fails ({_reason(error)})"
        ) from None
    if content.strip() not in text:
        raise PromptError(
            f"{tokenizer.name_or_path}: the chat template drops or changes the user's words "
            f"{_shown(content)}"
        )
    return text


def _shown(content: str) -> str:
    return repr(content if len(content) <= 60 else f"{content[:59]}…")


def _reason(error: Exception) -> str:
    """The first line of an error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The token ids of one example.

    Example: a prompt of 4 ids with <|AUDIO|> at position 1, 10 speech tokens, and an answer of 2
    ids:
        tokens      p0 0 0 0 0 0 0 0 0 0 0 p2 p3 a0 a1 end
        loss_mask   1 at a0, a1 and end

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


def joined(answer: str) -> str:
    """An answer as it follows another one: after a space. An empty answer adds nothing."""
    return f" {answer}" if answer else ""


class PromptTokenizer:
    """Converts examples to token ids with the tokenizer's chat template.

    Only the chat template and the task give control tokens: <|im_end|> or <|AUDIO|> in an
    instruction or an answer is text. Prompt ids are cached. Instances can be pickled for worker
    processes.

    Attributes:
        end_id: the end of an answer, which the model is trained to predict.
        stop_ids: others that the language model ends a text with.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO)
        self.end_id = _end_of_turn(tokenizer)
        self.stop_ids = tuple(sorted(_stop_ids(tokenizer) - {self.end_id}))
        self._control = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        longest_first = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
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

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer in generation; the first is that of training."""
        return (self.end_id, *self.stop_ids)

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in which no token is a control token."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(list(texts), **options)["input_ids"]

    def _shielded_ids(self, text: str) -> list[int]:
        """The ids of a rendered template in which names of control tokens are shielded."""
        ids, first = [], 0
        for match in [*self._pattern.finditer(text), None]:
            plain = text[first : match.start() if match else len(text)].replace(_SHIELD, "")
            ids += self._plain_ids([plain])[0] if plain else []
            if match:
                ids.append(self._control[match[0]])
                first = match.end()
        return ids

    def _encode_prompt(self, task: str | None, instruction: str | None) -> tuple[int, ...]:
        instruction = instruction or ""
        shielded = self._pattern.sub(lambda found: _SHIELD.join(found[0]), instruction)
        text = _apply_template(self.tokenizer, self.user_turn(task, shielded))
        if shielded == instruction:
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            ids = tuple(self._shielded_ids(text))
        if ids.count(self.audio_id) != (task is not None):
            raise PromptError(
                f"{self.tokenizer.name_or_path}: the chat template or the tokenizer does not keep "
                f"{AUDIO} as one token"
            )
        return ids

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
        Empty parts, of clips without speech, are left out.
        """
        if isinstance(answer, str):
            answer = [answer]
        spoken = [part for part in answer if part]
        parts = [*spoken[:1], *(joined(part) for part in spoken[1:])]
        return [*(id for ids in self._plain_ids(parts) for id in ids), self.end_id]

    def answer_length(self, answer: str) -> int:
        """Number of tokens of an answer, without the end-of-turn token."""
        return len(self.answer_ids(answer)) - 1

    def answer_lengths(self, answers: Sequence[str]) -> np.ndarray:
        """Number of tokens of every answer, without the end-of-turn token: int64 [answers]."""
        lengths = []
        for start in range(0, len(answers), _TOKENIZER_BATCH):
            texts = answers[start : start + _TOKENIZER_BATCH]
            lengths += [len(ids) for ids in self._plain_ids(texts)]
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
