"""Paired bootstrap of two files of predictions."""

import json

import numpy as np
import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import compare

RIGHT, WRONG = "a b c d e", "a b c d f"


def write(path, texts, **fields):
    """One prediction of `RIGHT` by text; a field that is a list has one value by prediction."""
    lines = []
    for i, text in enumerate(texts):
        own = {name: v[i] if isinstance(v, list) else v for name, v in fields.items()}
        base = {"id": f"u{i}", "task": "asr", "lang": "de", "seconds": 2.0, "stop_reason": "eos"}
        lines.append(base | {"reference": RIGHT, "hypothesis": text} | own)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compared(tmp_path, a, b, by=None, **fields):
    found = compare.files(
        write(tmp_path / "a.jsonl", a, **fields), write(tmp_path / "b.jsonl", b, **fields), by
    )
    return {each.score: each for each in found}


def test_a_clear_difference(tmp_path):
    """A: 100 of 200 utterances with one error of five words, 10 %; B: 20 of them, 2 %.

    The difference of the pairs is 0.4 errors ± 0.49 by utterance: 8 points, standard error 0.69.
    """
    found = compared(tmp_path, [WRONG] * 100 + [RIGHT] * 100, [WRONG] * 20 + [RIGHT] * 180)
    wer = found["wer"]
    assert (wer.a, wer.b, wer.units) == (10.0, 2.0, "200 utterances")
    assert wer.difference == pytest.approx(-8.0)
    assert wer.interval == pytest.approx((-8 - 1.96 * 0.69, -8 + 1.96 * 0.69), abs=0.15)
    assert (wer.improvement, wer.p) == (1.0, pytest.approx(2 / 10_001))
    assert list(found) == ["wer", "cer"]
    assert str(wer).startswith("     asr wer              A 10.000  B 2.000  B - A -8.000 [-9.")


def test_pairs_count_not_two_independent_scores(tmp_path):
    """Equal answers differ in no resample; with other errors of equal number nothing is clear."""
    one = [WRONG, RIGHT] * 50
    same = compared(tmp_path, one, one)["wer"]
    assert (same.interval, same.improvement, same.p) == ((0.0, 0.0), 0.5, 1.0)
    other = compared(tmp_path, one, one[::-1])["wer"]
    assert other.difference == 0
    assert other.interval == pytest.approx((-1.96 * 2, 1.96 * 2), abs=0.3)
    assert other.improvement == pytest.approx(0.5, abs=0.02)
    assert other.p > 0.95


def test_utterances_of_a_recording_are_resampled_together(tmp_path):
    """B is better in ten recordings of twelve, by all ten utterances of each."""
    recordings = [f"r{i // 10}" for i in range(120)]
    a, b = [WRONG] * 100 + [RIGHT] * 20, [RIGHT] * 100 + [WRONG] * 20
    by_recording = compared(tmp_path, a, b, recording=recordings)["wer"]
    assert by_recording.units == "12 recordings"
    by_utterance = compared(tmp_path, a, b, "utterance", recording=recordings)["wer"]
    assert by_utterance.difference == by_recording.difference == pytest.approx(-20 * 80 / 120)
    widths = [np.ptp(each.interval) for each in (by_recording, by_utterance)]
    assert widths[0] == pytest.approx(widths[1] * np.sqrt(10), rel=0.1)
    with pytest.raises(UserError, match="only one speaker with a wer, and a bootstrap needs two"):
        compared(tmp_path, a, b, "speaker", speaker="s")
    with pytest.raises(UserError, match=r"120 predictions have no speaker \(such as 'u0'\)"):
        compared(tmp_path, a, b, "speaker", recording=recordings)


def test_english_has_the_leaderboards_score_too(tmp_path):
    """The references of clips without words are left out of it."""
    fields = {"lang": "en", "reference": ["ice cream", "", "yes"]}
    found = compared(tmp_path, ["ice cream", "you", "no"], ["icecream", "", "yes"], **fields)
    assert [(s.a, s.b, s.units) for s in (found["wer"], found["leaderboard_wer"])] == [
        (pytest.approx(200 / 3), pytest.approx(200 / 3), "3 utterances"),
        (pytest.approx(100 / 3), 0.0, "2 utterances"),
    ]


def test_other_tasks(tmp_path):
    """More is better; a mean over utterances."""
    answers = compared(tmp_path, ["x"] * 30, [RIGHT] * 20 + ["x"] * 10, task="sqqa")
    assert (answers["em"].a, answers["em"].b) == (0.0, pytest.approx(200 / 3))
    assert answers["em"].improvement == 1.0
    translations = compared(tmp_path, [WRONG] * 30, [RIGHT] * 30, task="ast")
    assert (translations["bleu"].b, translations["bleu"].interval) == (pytest.approx(100), None)
    assert translations["bleu"].p < 0.01


def test_chunks_are_joined_first(tmp_path):
    chunks = {"parent_id": ["r", "r", "s"], "chunk_index": [0, 1, 0]}
    found = compared(tmp_path, ["a b c", "d e", RIGHT], ["a b c", "d f", RIGHT], **chunks)
    assert (found["wer"].a, found["wer"].b, found["wer"].units) == (0.0, 10.0, "2 utterances")


def test_files_of_other_sets_are_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", [RIGHT] * 3)
    b = write(tmp_path / "b.jsonl", [RIGHT] * 2, id=["u1", "u7"], reference=["x", RIGHT])
    message = (
        r"2 only in .*a.jsonl \(such as 'u0'\), 1 only in .*b.jsonl \(such as 'u7'\), "
        r"1 with another reference \(such as 'u1'\)"
    )
    with pytest.raises(UserError, match=message):
        compare.files(a, b)
