"""The tasks: tokens, default instructions, metrics, and whether long audio can be split."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the paper's third stage.

    Attributes:
        token: the added token that opens its user turn.
        instruction: the default instruction.
        metric: the main score (see `evaluation.metrics`); transcripts in languages without word
            boundaries use the character error rate instead.
        is_normalized: whether Whisper's normalizer is applied to both texts before they are scored.
        is_splittable: whether the answers for consecutive pieces of a recording add up to the
            answer for the whole. A transcript's do; a summary's do not.
    """

    token: str
    instruction: str
    metric: str
    is_normalized: bool = False
    is_splittable: bool = False


TASKS = {
    "asr": Task(
        "<|ASR|>",
        "Transcribe the audio clip into text.",
        metric="wer",
        is_normalized=True,
        is_splittable=True,
    ),
    "ast": Task(
        "<|AST|>", "Translate the audio clip into Korean.", metric="chrf", is_splittable=True
    ),
    "ssum": Task("<|SSUM|>", "Summarize the audio clip.", metric="rougeL"),
    "sqqa": Task(
        "<|SQQA|>", "Answer the question in the audio clip.", metric="em", is_normalized=True
    ),
}


def with_context(task: str, instruction: str | None, context: str) -> str | None:
    """The instruction of a user turn, with context if there is any (docs/data.md).

    Example: "Transcribe the audio clip into text.\\nContext: Anna, Vienna".

    Args:
        instruction: None: the task's.
        context: phrases that may occur in the audio, or a text about it; "" for none.
    """
    if not context:
        return instruction
    return f"{instruction or TASKS[task].instruction}\nContext: {context}"
