"""Questions about the words of transcribed clips, for training and evaluation of task sqqa.

    python -m fastslm_jax.data.questions speech/train.jsonl [--seed=0]

writes speech/train_questions.jsonl, a manifest of the same audio files with one question about each
clip and its answer:

| question | answer |
|---|---|
| What is the first word? | press |
| What is the last word? | sales |
| Which word follows "two"? | for |
| Is the word "two" said? | yes (in the other half of the cases, no) |
| How many words are said? | four (clips of at most twelve words) |
| Is anybody speaking? | yes (and no, of clips without speech) |

Words are in lower case and without punctuation. Clips of tasks other than asr are left out.
"""

import collections
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from fastslm_jax import cli, outputs
from fastslm_jax.data.contamination import words
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.errors import UserError

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
Question = tuple[str, str]  # and its answer

FLAGS = flags.FLAGS


def _follows(said: Sequence[str], rng: np.random.Generator) -> Question | None:
    once = [at for at, word in enumerate(said[:-1]) if said.count(word) == 1]
    if not once:
        return None
    at = once[rng.integers(len(once))]
    return f'Which word follows "{said[at]}"?', said[at + 1]


def ask(said: Sequence[str], others: Sequence[str], rng: np.random.Generator) -> Question:
    """A question about a clip, and its answer.

    Args:
        said: the words of the clip; none if nobody speaks.
        others: words to ask for that are not said.
        rng: which question is asked.
    """
    if not said or rng.random() < 0.05:
        return "Is anybody speaking?", "yes" if said else "no"

    def is_said() -> Question:
        pool = said if rng.random() < 0.5 else [word for word in others if word not in said]
        word = pool[rng.integers(len(pool))] if pool else said[0]
        return f'Is the word "{word}" said?', "yes" if word in said else "no"

    kinds: list[Callable[[], Question | None]] = [
        lambda: ("What is the first word?", said[0]),
        lambda: ("What is the last word?", said[-1]),
        lambda: _follows(said, rng),
        is_said,
        lambda: ("How many words are said?", NUMBERS[len(said)]) if len(said) <= 12 else None,
    ]
    found = None
    while found is None:
        found = kinds[rng.integers(len(kinds))]()
    return found


def define_flags() -> None:
    flags.DEFINE_integer("seed", 0, "Seed of the choice of questions.")


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one manifest: python -m fastslm_jax.data.questions MANIFEST")
    path = pathlib.Path(argv[1])
    if path.is_dir():
        raise UserError(f"{path}: is a folder; questions are written beside a manifest")
    clips = read_manifest(path, ("asr",))
    said = [words(clip.text) for clip in clips]
    lines, counts = [], collections.Counter()
    for number, clip in enumerate(clips):
        rng = np.random.default_rng((FLAGS.seed, number))
        question, answer = ask(said[number], said[rng.integers(len(clips))], rng)
        counts[question.partition('"')[0].strip()] += 1
        line = {
            "id": f"{clip.id}-question",
            "audio_filepath": pathlib.Path(clip.path).relative_to(path.parent.resolve()).as_posix(),
            "duration": clip.seconds,
            "text": clip.text,
            "task": "sqqa",
            "prompt": question,
            "answer": answer,
            "speaker": clip.speaker,
            "recording": clip.recording,
        }
        line |= {"offset": clip.offset} if clip.has_offset else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    out = path.with_name(f"{path.stem}_questions.jsonl")
    outputs.write_text(out, "".join(lines))
    for question, count in sorted(counts.items()):
        print(f"{count:>8}  {question}")
    print(f"{len(lines)} questions in {out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
