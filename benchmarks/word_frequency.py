"""Wrong words of a model by how often each word is in its training texts.

    python benchmarks/word_frequency.py PREDICTIONS --texts=train.jsonl,… [--references=TEXTFILE]

PREDICTIONS is a predictions.jsonl of eval.py. Texts are manifests, imported folders or text files.
A word of a reference is wrong if the best alignment has no equal word for it, after the language's
normalizer; inserted words are counted apart. --references keeps the utterances whose text is a
line of TEXTFILE. The baseline is the most frequent words. Last line: one JSON object.
"""

import collections
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import asr_predictions
import jiwer
from absl import flags
from banner import print_banner

from fastslm_jax import cli
from fastslm_jax.data.contamination import read_texts
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics

FLAGS = flags.FLAGS
EDGES = (0, 1, 3, 10, 30, 100, 1000)  # the first count of each group of words


def define_flags() -> None:
    flags.DEFINE_list("texts", None, "The training texts.")
    asr_predictions.define_flags()


def alignment(reference: str, hypothesis: str) -> tuple[list[tuple[str, bool]], int]:
    """(word, is wrong) of each word of a reference, and the number of inserted words."""
    words = reference.split()
    if not words:
        return [], len(hypothesis.split())
    found, inserted = [], 0
    for part in jiwer.process_words(reference, hypothesis).alignments[0]:
        is_wrong = part.type != "equal"
        found += [(word, is_wrong) for word in words[part.ref_start_idx : part.ref_end_idx]]
        if part.type == "insert":
            inserted += part.hyp_end_idx - part.hyp_start_idx
    return found, inserted


def group(count: int) -> int:
    """The index in EDGES of a word that occurs `count` times."""
    return max(i for i, edge in enumerate(EDGES) if count >= edge)


def name(index: int) -> str:
    first, after = EDGES[index], EDGES[index + 1 : index + 2]
    if not after:
        return f"from {first}"
    return f"{first}" if after[0] == first + 1 else f"{first} to {after[0] - 1}"


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("name one file of predictions")
    print_banner("Wrong words by frequency in training; the most frequent are the baseline.", "cpu")
    predictions = asr_predictions.read(argv[1])
    lang = predictions[0]["lang"]
    counts = collections.Counter(
        word
        for path in FLAGS.texts
        for text in read_texts(path)
        for word in metrics.normalize(text, lang).split()
    )
    words, wrong, inserted = [0] * len(EDGES), [0] * len(EDGES), 0
    for prediction in predictions:
        texts = (metrics.normalize(prediction[x], lang) for x in ("reference", "hypothesis"))
        found, more = alignment(*texts)
        inserted += more
        for word, is_wrong in found:
            index = group(counts[word])
            words[index] += 1
            wrong[index] += is_wrong
    rates = [100 * bad / count if count else 0.0 for bad, count in zip(wrong, words, strict=True)]
    vocabulary = collections.Counter(map(group, counts.values()))
    print("in training   words   wrong   (different words of the training texts)")
    for index, rate in enumerate(rates):
        ratio = f"{rate / rates[-1]:.2f} times" if rates[-1] else ""
        print(f"{name(index):>11} {words[index]:>7} {rate:>6.1f} %  {ratio}  ({vocabulary[index]})")
    total = sum(words)
    wer = 100 * (sum(wrong) + inserted) / total if total else 0.0
    print(f"{'all':>11} {total:>7} {100 * sum(wrong) / max(1, total):>6.1f} %")
    print(f"{inserted} inserted words; WER {wer:.1f} %")
    print(json.dumps({"from": EDGES, "words": words, "wrong": wrong, "inserted": inserted}))


if __name__ == "__main__":
    define_flags()
    cli.run(main, ("texts",))
