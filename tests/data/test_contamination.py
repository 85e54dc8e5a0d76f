"""What training data shares with test data."""

import json

import numpy as np
import pytest
import soundfile
from signals import noise

from fastslm_jax.data import contamination
from fastslm_jax.data.contamination import KnownTexts, Overlap, overlap, words
from fastslm_jax.errors import UserError


def test_words_have_no_case_and_no_punctuation():
    assert words("Don’t stop -- at No. 9, STOP!") == ("don't", "stop", "at", "no", "9", "stop")
    assert words("Straße, 안녕 café_au") == ("strasse", "안녕", "café", "au")
    assert words("… - !") == ()


def test_shared_sentences_and_ngrams():
    train = ["Press one to go on.", "press one, to GO on", "to go on now", "hello"]
    test = ["press one to go on", "please press one to listen", "Hello!", "...", "bye"]
    found = overlap(train, test, n=3)
    assert found == Overlap(
        texts=3,
        texts_with_ngrams=3,
        sentences=("hello", "press one to go on"),
        ngrams=("one to go", "press one to", "to go on"),
    )
    assert overlap(["..."], ["..."]) == Overlap(0, 0, (), ())


def test_a_short_text_has_no_ngrams():
    known = KnownTexts(["one two three", "one two three four five"], n=4)
    assert known.shared("one two three") == set()
    assert known.shared("so one two three four") == {("one", "two", "three", "four")}
    assert known.has("One, two, three?")


@pytest.fixture
def manifests(tmp_path):
    """train: two clips; test: a copy of the first (as flac, of a longer file), and another."""

    def write(name: str, lines: list[dict]) -> str:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    first, second, third = ((32767 * noise(1.0, seed)).astype(np.int16) for seed in range(3))
    soundfile.write(tmp_path / "a.wav", first, 16_000)
    soundfile.write(tmp_path / "b.wav", second, 16_000)
    soundfile.write(tmp_path / "long.flac", np.concatenate([third, first]), 16_000)
    clip = {"duration": 1.0, "text": "one two three four"}
    train = [clip | {"audio_filepath": f"{name}.wav", "id": name} for name in "ab"]
    test = [
        clip | {"audio_filepath": "long.flac", "offset": float(at), "id": f"t{at}", "text": text}
        for at, text in enumerate(("six", "Two three four, five!"))
    ]
    return write("train.jsonl", train), write("test.jsonl", test)


def test_a_report_about_two_manifests(manifests):
    assert contamination.report(*manifests, n=3) == [
        "sentences: 0 of TEST occur in TRAIN, 0 times in 2 texts",
        "3-grams: 1 of TEST occur in TRAIN, in 2 of 2 texts (first: 'two three four')",
        "audio: 1 pairs of equal clips (first: 'a = t1')",
    ]


def test_text_files_are_compared_by_their_lines(manifests, tmp_path):
    (tmp_path / "lines.txt").write_text("six\n\none two\n")
    assert contamination.report(str(tmp_path / "lines.txt"), manifests[1]) == [
        "sentences: 1 of TEST occur in TRAIN, 1 times in 2 texts (first: 'six')",
        "4-grams: 0 of TEST occur in TRAIN, in 0 of 2 texts",
    ]
    with pytest.raises(UserError, match=r"none\.txt: no such file of sentences"):
        contamination.report(str(tmp_path / "none.txt"), manifests[1])
