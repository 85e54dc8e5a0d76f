"""Counts what training data shares with test data: sentences, n-grams of words, and audio.

    python -m fastslm_jax.data.contamination TRAIN TEST [--n=4]

TRAIN and TEST are manifests, imported folders, or text files with one sentence per line (of which
only the texts are compared). Case and punctuation do not matter.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

from absl import flags
from tqdm import tqdm

from fastslm_jax import cli
from fastslm_jax.data.manifest import Utterance, read_clip, read_manifest
from fastslm_jax.errors import UserError

DEFAULT_N = 4
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_Ngram = tuple[str, ...]

FLAGS = flags.FLAGS


def words(text: str) -> tuple[str, ...]:
    """Words in lower case, without punctuation: "Don’t stop!" → ("don't", "stop")."""
    return tuple(word.replace("’", "'") for word in _WORD.findall(text.casefold()))


def ngrams(sentence: Sequence[str], n: int = DEFAULT_N) -> set[_Ngram]:
    """All runs of n words."""
    return {tuple(sentence[at : at + n]) for at in range(len(sentence) - n + 1)}


class KnownTexts:
    """The sentences and n-grams of texts. A text without words is not a sentence.

    Attributes:
        sentences: the words of every text.
        ngrams: all n-grams.
    """

    def __init__(self, texts: Iterable[str], n: int = DEFAULT_N) -> None:
        self.n = n
        self.sentences = {words(text) for text in texts} - {()}
        self.ngrams = {ngram for sentence in self.sentences for ngram in ngrams(sentence, n)}

    def has(self, text: str) -> bool:
        """Whether a text is one of the sentences."""
        return words(text) in self.sentences

    def shared(self, text: str) -> set[_Ngram]:
        """The n-grams that a text has in common with the sentences."""
        return ngrams(words(text), self.n) & self.ngrams


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What training texts share with test texts.

    Attributes:
        texts: training texts that are equal to a test text.
        texts_with_ngrams: training texts with an n-gram of a test text.
        sentences: different test sentences, as text, that occur in training.
        ngrams: different test n-grams, as text, that occur in training.
    """

    texts: int
    texts_with_ngrams: int
    sentences: tuple[str, ...]
    ngrams: tuple[str, ...]


def overlap(train: Iterable[str], test: Iterable[str], n: int = DEFAULT_N) -> Overlap:
    """Compares two lists of texts.

    Example: train "press one to go on", test "press one to listen", n = 3 → no sentence, and the
    n-gram "press one to" in one text.
    """
    known, texts, texts_with_ngrams = KnownTexts(test, n), 0, 0
    sentences, shared = set(), set()
    for text in train:
        if known.has(text):
            texts += 1
            sentences.add(words(text))
        if found := known.shared(text):
            texts_with_ngrams += 1
            shared |= found
    in_order = [sorted(map(" ".join, found)) for found in (sentences, shared)]
    return Overlap(texts, texts_with_ngrams, *map(tuple, in_order))


def _sha256(utterance: Utterance) -> str:
    return hashlib.sha256(read_clip(utterance).tobytes()).hexdigest()


def equal_audio(train: Sequence[Utterance], test: Sequence[Utterance]) -> list[tuple[str, str]]:
    """(training id, test id) of clips with equal samples.

    Only clips of equal length are decoded.
    """
    lengths = {u.num_samples for u in train} & {u.num_samples for u in test}
    by_hash: dict[str, list[str]] = collections.defaultdict(list)
    candidates = [[u for u in part if u.num_samples in lengths] for part in (test, train)]
    with tqdm(total=sum(map(len, candidates)), unit="clip", desc="audio", disable=None) as bar:
        for utterance in candidates[0]:
            by_hash[_sha256(utterance)].append(utterance.id)
            bar.update()
        equal = []
        for utterance in candidates[1]:
            equal += [(utterance.id, other) for other in by_hash.get(_sha256(utterance), ())]
            bar.update()
    return equal


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file, without blank ones and with single spaces.

    Raises:
        UserError: there is no such file, it is not UTF-8, or it is empty.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of sentences")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at {error.start})") from None
    lines = [" ".join(line.split()) for line in text.splitlines()]
    if not any(lines):
        raise UserError(f"{path}: contains no sentences")
    return [line for line in lines if line]


def read_utterances(path: str | os.PathLike) -> list[Utterance] | None:
    """The utterances of a manifest (a name that ends with .jsonl or .json) or imported folder.

    Returns:
        None for another file, which is a text file.
    """
    is_text = not os.path.isdir(path) and not str(path).endswith((".jsonl", ".json"))
    return None if is_text else read_manifest(path)


def read_texts(path: str | os.PathLike) -> list[str]:
    """Transcripts and answers of a manifest or imported folder, or the lines of a text file."""
    utterances = read_utterances(path)
    if utterances is None:
        return read_lines(path)
    return [text for u in utterances for text in dict.fromkeys((u.text, u.answer)) if text]


def report(train: str, test: str, n: int = DEFAULT_N) -> list[str]:
    """One line each about shared sentences, n-grams and audio."""
    texts = [read_texts(path) for path in (train, test)]
    found = overlap(*texts, n)

    def first(examples: Sequence[str]) -> str:
        return f" (first: {examples[0]!r})" if examples else ""

    lines = [
        f"sentences: {len(found.sentences)} of TEST occur in TRAIN, {found.texts} times in "
        f"{len(texts[0])} texts{first(found.sentences)}",
        f"{n}-grams: {len(found.ngrams)} of TEST occur in TRAIN, in {found.texts_with_ngrams} of "
        f"{len(texts[0])} texts{first(found.ngrams)}",
    ]
    clips = [read_utterances(path) for path in (train, test)]
    if all(part is not None for part in clips):
        equal = equal_audio(*clips)
        examples = [f"{ours} = {theirs}" for ours, theirs in equal]
        lines.append(f"audio: {len(equal)} pairs of equal clips{first(examples)}")
    return lines


def define_flags() -> None:
    flags.DEFINE_integer("n", DEFAULT_N, "Words of an n-gram.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) != 3:
        raise UserError("exactly two arguments are required: TRAIN TEST")
    print("\n".join(report(argv[1], argv[2], FLAGS.n)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
