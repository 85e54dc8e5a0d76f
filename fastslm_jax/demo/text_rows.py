"""Packed rows of text that teach the demo's language model all tasks before it receives speech.

A speech token covers more than one word, and a decoder that has only read whole words cannot
separate them: a small one repeated 7 % of such sentences exactly. (A large model has this ability,
or learns it from thousands of hours.) Most texts are therefore blurred: laid out in time, with ten
positions per six seconds, each the mean of the embeddings of the words around it.
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo.examples import draw_example

SPEECH_INSTRUCTIONS = {name: task.instruction for name, task in TASKS.items()}
TEXT_INSTRUCTIONS = {
    "asr": "Repeat the text.",
    "ast": "Translate the text into Korean.",
    "ssum": "Summarize the text.",
    "sqqa": "Answer the question in the text.",
}
TEXT_MARK = "<TEXT>"
WINDOW_SECONDS, WINDOW_POSITIONS, WINDOW_FRAMES = 6.0, 10, 300
BLUR_WORDS = 8  # words per blurred position, at most
P_INPUT_ERROR = 0.08  # per token


@dataclasses.dataclass(frozen=True)
class TextExample:
    """Inputs and targets of the language model.

    The input at position i is the mean of the embeddings of `ids[i]`, weighted by `weights[i]`,
    plus Gaussian noise of `noise[i]` times the RMS of the embedding table. Predicting `tokens[i]`
    from the positions before it has the loss weight `loss[i]`.

    Shapes: tokens, loss, noise [length]; ids, weights [length, BLUR_WORDS].
    """

    tokens: np.ndarray
    loss: np.ndarray
    noise: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def plain_text(ids: Sequence[int], loss: float) -> TextExample:
    """Every position reads its own token."""
    length = len(ids)
    table = np.zeros((length, BLUR_WORDS), np.int32)
    weights = np.zeros((length, BLUR_WORDS), np.float32)
    table[:, 0], weights[:, 0] = ids, 1.0
    return TextExample(
        np.array(ids, np.int32),
        np.full(length, loss, np.float32),
        np.zeros(length, np.float32),
        table,
        weights,
    )


def concatenate(*parts: TextExample) -> TextExample:
    fields = [field.name for field in dataclasses.fields(TextExample)]
    return TextExample(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in fields)
    )


def pad(text: TextExample, length: int) -> TextExample:
    return concatenate(text, plain_text([0] * (length - len(text.tokens)), 0.0))


def stack(texts: Sequence[TextExample]) -> tuple[np.ndarray, ...]:
    """The fields of texts of one length: [batch, length, ...] each."""
    fields = [field.name for field in dataclasses.fields(TextExample)]
    return tuple(np.stack([getattr(text, name) for text in texts]) for name in fields)


def blur(
    words: Sequence[tuple[int, int]], silence: int, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Lays words out in time as speech and mixes them like speech tokens.

    Words get durations, pauses and a tempo. A position is the mean of the words (and of `silence`)
    weighted by a triangle around its time, cut off at the borders of its window.

    Args:
        words: (id, number of characters) of each word.
        silence: id of silence.
        rng: source of durations, pauses, tempo and the width of the triangle.

    Returns:
        ids and weights [positions, BLUR_WORDS]; the weights of a position sum to one.
    """
    spoken = _times(words, rng)
    windows = max(1, int(np.ceil(spoken[-1][1] / WINDOW_SECONDS)))
    frame = 0.02  # seconds
    word_of_frame = np.full(windows * WINDOW_FRAMES, -1)
    for index, (start, end) in enumerate(spoken):
        word_of_frame[round(start / frame) : round(end / frame)] = index
    reach = rng.uniform(0.35, 0.9)
    times = (np.arange(WINDOW_FRAMES) + 0.5) * frame
    centers = WINDOW_SECONDS / WINDOW_POSITIONS * (np.arange(WINDOW_POSITIONS) + 0.5)
    triangles = np.maximum(0.0, 1 - np.abs(times - centers[:, None]) / reach)
    triangles /= triangles.sum(axis=1, keepdims=True)
    present = word_of_frame[:, None] == np.arange(-1, len(spoken))  # [frames, 1 + words]
    weights = triangles @ present.reshape(windows, WINDOW_FRAMES, -1)
    weights = weights.reshape(windows * WINDOW_POSITIONS, -1)
    heaviest = np.argsort(-weights, axis=1)[:, :BLUR_WORDS]
    heaviest = np.pad(heaviest, ((0, 0), (0, BLUR_WORDS - heaviest.shape[1])), mode="edge")
    chosen = np.take_along_axis(weights, heaviest, axis=1)
    chosen[:, 1:] *= heaviest[:, 1:] != heaviest[:, :-1]  # padding has no weight
    ids = np.array([silence, *(word for word, _ in words)])
    return ids[heaviest], chosen / chosen.sum(axis=1, keepdims=True)


def _times(words: Sequence[tuple[int, int]], rng: random.Random) -> list[tuple[float, float]]:
    """Random (start, end) of each word in seconds."""
    tempo = rng.uniform(0.8, 1.25)
    time, spoken = rng.uniform(0.0, 0.3), []
    for _, characters in words:
        time += rng.uniform(0.0, 0.7) if rng.random() < 0.03 else 0.0
        seconds = tempo * (0.14 + 0.05 * characters) * rng.uniform(0.8, 1.2)
        spoken.append((time, time + seconds))
        time += seconds
    return spoken


def with_input_errors(text: TextExample, rng: random.Random) -> TextExample:
    """Replaces some inputs with other tokens of the text; the targets stay the same.

    During generation a model reads its own mistakes, and has to recover from them.
    """
    ids = text.ids.copy()
    replaced = [i for i in range(len(ids)) if rng.random() < P_INPUT_ERROR]
    ids[replaced, 0] = rng.choices(text.ids[:, 0].tolist(), k=len(replaced))
    return dataclasses.replace(text, ids=ids)


def chat_example(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    instruction: str,
    answer: str,
    blur_rng: random.Random | None = None,
    error_rng: random.Random | None = None,
) -> TextExample:
    """A user turn with a text and an instruction, and the answer.

    Args:
        tokenizer: tokenizer with a chat template.
        text: what the instruction is about.
        instruction: the task in words.
        answer: the target.
        blur_rng: blurs the text and adds noise to it; None: the text is read as it is.
        error_rng: replaces some inputs of the answer; None: the answer is read as it is.
    """
    messages = [{"role": "user", "content": f"{TEXT_MARK}\n{instruction}"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    target_ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    # Answers of up to 12 tokens have the same total weight: long ones would outweigh short ones.
    target = plain_text(target_ids, max(1.0, 12 / len(target_ids)))
    if error_rng is not None:
        target = with_input_errors(target, error_rng)
    if blur_rng is None:
        prompt_ids = tokenizer(prompt.replace(TEXT_MARK, text))["input_ids"]
        return concatenate(plain_text(prompt_ids, 0.02), target)
    before, after, words = (
        tokenizer(part)["input_ids"] for part in (*prompt.split(TEXT_MARK), text)
    )
    silence = tokenizer.pad_token_id
    lengths = [(token, len(tokenizer.decode([token]).strip())) for token in words]
    ids, weights = blur(lengths, silence, blur_rng)
    speech = TextExample(
        tokens=np.full(len(ids), silence, np.int32),
        loss=np.zeros(len(ids), np.float32),
        noise=np.zeros(len(ids), np.float32) + blur_rng.uniform(0.0, 0.6),
        ids=ids,
        weights=weights,
    )
    return concatenate(plain_text(before, 0.0), speech, plain_text(after, 0.0), target)


def _sentences(count: int, rng: random.Random) -> str:
    return " ".join(draw_example("asr", rng, "train").text for _ in range(count))


def _instruction(task: str, rng: random.Random) -> str:
    return rng.choice((TEXT_INSTRUCTIONS, SPEECH_INSTRUCTIONS))[task]


def _draw_transcript(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, max_sentences: int
) -> TextExample:
    """A long text to repeat."""
    text = _sentences(rng.randint(max_sentences // 8, max_sentences), rng)
    instruction = _instruction("asr", rng)
    blur_rng = rng if rng.random() < 0.8 else None
    error_rng = rng if rng.random() < 0.5 else None
    return chat_example(tokenizer, text, instruction, text, blur_rng, error_rng)


def _draw_any(tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int) -> TextExample:
    """A plain sentence, or an example of any task that may fit into a row of `length`."""
    if rng.random() < 0.1:
        drawn = draw_example("ast", rng, "train")
        ids = tokenizer(rng.choice((drawn.text, drawn.answer)))["input_ids"]
        return plain_text([*ids, tokenizer.eos_token_id], 1.0)
    task = rng.choices(("asr", "ast", "ssum", "sqqa"), (3, 2, 2, 5))[0]
    drawn = draw_example(task, rng, "train")
    text, answer = drawn.text, drawn.answer
    if task == "asr":
        count = 1 if rng.random() < 0.5 else rng.randint(1, max(1, length // 34))
        text = answer = _sentences(count, rng)
    instruction = _instruction(task, rng)
    blur_rng = rng if rng.random() < 0.7 else None
    return chat_example(tokenizer, text, instruction, answer, blur_rng)


def text_rows(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    step: int,
    length: int,
    batch: int,
    max_sentences: int = 0,
) -> tuple[np.ndarray, ...]:
    """The packed batch of a training step.

    Args:
        tokenizer: tokenizer with a chat template.
        seed: seed of the training run.
        step: number of the step.
        length: tokens per row.
        batch: rows.
        max_sentences: rows have transcripts of up to this many sentences; 0: all tasks.

    Returns:
        segment ids and positions [batch, length], and the fields of `TextExample`,
        [batch, length, ...] each.
    """
    rng = random.Random(f"rows/{seed}/{step}")
    segments, positions = np.zeros((2, batch, length), np.int32)
    rows = []
    for row in range(batch):
        used, parts = 0, []
        while True:
            if max_sentences:
                drawn = _draw_transcript(tokenizer, rng, max_sentences)
            else:
                drawn = _draw_any(tokenizer, rng, length)
            size = len(drawn.tokens)
            if used + size > length:
                if parts:
                    break
                continue  # longer than a whole row: draw another
            parts.append(drawn)
            segments[row, used : used + size] = len(parts)
            positions[row, used : used + size] = np.arange(size)
            used += size
        rows.append(pad(concatenate(*parts), length))
    return segments, positions, *stack(rows)
