"""The leaderboard's convention, with scores that were worked out by hand."""

import datetime

import huggingface_hub
import pytest
import yaml

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import leaderboard, predict

# (reference, hypothesis, (substitutions, insertions, deletions, words of the reference)).
# Merged words count as they are written in the reference: "ice cream" is two words, "icecream" one.
CASES = {
    "two words heard as one": ("I like ice cream.", "i like icecream", (0, 0, 0, 4)),
    "one word heard as two": ("I like icecream.", "i like ice cream", (0, 0, 0, 3)),
    "three words as one": ("a state of the art model", "a stateoftheart model", (0, 0, 0, 6)),
    # Letters must be the same: "whitepapers" replaces "white", and "paper" is missing.
    "not the same letters": ("the white paper", "the whitepapers", (1, 0, 1, 3)),
    # Words of one side are merged to one word of the other; "ice cream" to "i scream" is not that.
    "other word boundaries": ("ice cream", "i scream", (2, 0, 0, 2)),
    "hyphens": ("a well-known e-mail", "a wellknown email", (0, 0, 0, 4)),
    "numbers": ("call one two three at twenty five", "call 123 at 25", (0, 0, 0, 4)),
    "money": ("twenty five dollars and 3 cents", "$25.03", (0, 0, 0, 1)),
    "a wrong number": ("it cost twenty dollars", "it cost 30 dollars", (1, 0, 0, 3)),
    "a large number": ("one thousand two hundred people", "1,200 people", (0, 0, 0, 2)),
    "spelling": ("The colour is grey, OK?", "the color is gray okay", (0, 0, 0, 5)),
    "contractions": ("It's late, we won't go.", "it is late we will not go", (0, 0, 0, 7)),
    # 's after a noun is no "is": "anna s" is merged with "annas".
    "a possessive": ("Anna's house", "annas house", (0, 0, 0, 3)),
    "a possessive heard as is": ("Anna's house", "anna is house", (1, 0, 0, 3)),
    "fillers": ("Uhm, so, ah, yes", "so yes", (0, 0, 0, 2)),
    "an acronym": ("the B. B. C. in the U. K.", "the bbc in the uk", (0, 0, 0, 5)),
    "letters that are words": ("I, a teacher", "i a teacher", (0, 0, 0, 3)),
    "all right": ("All right, et cetera", "alright etc", (0, 0, 0, 2)),
    "kinda stays": ("kinda late", "kind of late", (1, 1, 0, 2)),
    "an empty answer": ("anna left early", "", (0, 0, 3, 3)),
    "an answer of fillers": ("anna left early", "um, hmm", (0, 0, 3, 3)),
    "a noise in brackets": ("anna left [laughter]", "anna left", (0, 0, 0, 2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hand_checked_counts(case):
    reference, hypothesis, expected = case
    assert leaderboard.counts([reference], [hypothesis]).tolist() == [list(expected)]


@pytest.mark.parametrize("reference", ["", "Um.", "[noise]", "ignore_time_segment_in_scoring"])
def test_references_without_words_are_left_out(reference):
    """jiwer counts the answer as two insertions: 3 errors of 2 words."""
    references, hypotheses = ["anna left", reference], ["anna ran", "thank you"]
    found = leaderboard.score(references, hypotheses)
    assert found["leaderboard_wer"] == 50.0
    assert found["leaderboard_counts"] == {
        "substitutions": 1,
        "insertions": 0,
        "deletions": 0,
        "words": 2,
        "scored": 1,
        "left_out": 1,
    }
    only = leaderboard.score([reference], ["thank you"])
    assert "leaderboard_wer" not in only
    assert only["leaderboard_counts"]["left_out"] == 1


def test_errors_are_pooled_over_the_corpus():
    """0 errors of 4 words and 1 of 1: 20 %, with an interval from none to one of one."""
    found = leaderboard.score(["i like ice cream", "yes"], ["i like icecream", "no"])
    assert found["leaderboard_wer"] == 20.0
    assert found["intervals"] == {"leaderboard_wer": [0.0, 100.0]}


def prediction(**fields):
    base = {
        "task": "asr",
        "lang": "en",
        "seconds": 2.0,
        "reference": "i like ice cream",
        "hypothesis": "i like icecream",
        "stop_reason": "eos",
    }
    return base | fields


def test_both_scores_and_what_they_are_of():
    """jiwer: "icecream" for "ice" and no "cream", 2 of 4 words."""
    summary = predict.summarize([prediction()], intervals=True)
    assert (summary["wer"], summary["leaderboard_wer"]) == (50.0, 0.0)
    assert summary["intervals"].keys() == {"wer", "cer", "leaderboard_wer"}
    scorers = summary["scorers"]
    assert scorers["wer"].startswith("jiwer ")
    assert "Whisper's normalizer" in scorers["wer"]
    assert scorers["leaderboard_wer"].startswith("kaldialign ")
    assert "Open ASR Leaderboard of 2026-08" in scorers["leaderboard_wer"]
    german = predict.summarize([prediction(lang="de")], intervals=True)
    assert not any(name.startswith("leaderboard") for name in german)


def test_a_normalizer_that_fails_costs_no_other_score(monkeypatch):
    def fail(text):
        raise ValueError("no such number")

    monkeypatch.setattr(leaderboard, "normalizer", lambda: fail)
    summary = predict.summarize([prediction()], intervals=True)
    assert summary["wer"] == 50.0
    assert summary["failed"] == {"leaderboard_wer": "ValueError: no such number"}


def chunk(parent, index, text, **fields):
    names = {"parent_id": parent, "chunk_index": index, "id": f"{parent}-{index}"}
    reference = {"a": "anna left early and ben stayed", "b": "yes"}[parent]
    return prediction(hypothesis=text, reference=reference, **names, **fields)


def test_chunks_are_joined_by_recording():
    """One of six words of the first recording is missing; chunks come in any order."""
    chunks = [
        chunk("b", 0, "yes", stop_reason="budget"),
        chunk("a", 2, "and ben ", covered_seconds=1.0),
        chunk("a", 0, "anna left", covered_seconds=2.0),
        chunk("a", 1, "", covered_seconds=2.0, stop_reason="loop"),
        chunk("a", 3, "stayed", covered_seconds=2.0),
        prediction(id="whole"),
    ]
    whole, first, second = leaderboard.joined(chunks)
    assert whole == chunks[-1]
    assert (first["id"], first["hypothesis"]) == ("a", "anna left and ben stayed")
    assert (first["seconds"], first["covered_seconds"], first["stop_reason"]) == (8.0, 7.0, "loop")
    assert (second["hypothesis"], second["stop_reason"]) == ("yes", "budget")
    summary = predict.summarize(chunks[:-1], intervals=True)
    assert (summary["utterances"], summary["deletions"], summary["words"]) == (2, 1, 7)
    assert summary["leaderboard_wer"] == pytest.approx(100 / 7, abs=1e-4)
    assert leaderboard.joined([first, second]) == [first, second]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk("a", 0, ""), chunk("a", 2, "")], r"chunk_index \[0, 2\], which should be 0 to 1"),
        ([chunk("a", 0, ""), chunk("a", 0, "")], r"chunk_index \[0, 0\]"),
        (
            [chunk("a", 0, ""), chunk("a", 1, "") | {"reference": "other"}],
            "different references; each needs that of the whole recording",
        ),
    ],
)
def test_chunks_that_cannot_be_joined(chunks, message):
    with pytest.raises(UserError, match=message):
        leaderboard.joined(chunks)


def test_eval_results_as_the_hub_reads_them():
    sets = {
        "clean": {"leaderboard_wer": 2.1234, "audio_seconds": 3600.0, "rtfx": 100.0},
        "other": {"leaderboard_wer": 4.0, "audio_seconds": 1800.0, "rtfx": 25.0},
    }
    tasks = leaderboard.parse_results(
        ["librispeech_clean_wer=clean", "mean_wer=clean+other", "rtfx=clean+other"]
    )
    text = leaderboard.eval_results(tasks, sets)
    entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load(text))
    found = [(entry.dataset_id, entry.task_id, entry.value) for entry in entries]
    dataset = "hf-audio/open-asr-leaderboard"
    # 5,400 seconds of audio in 36 + 72 seconds.
    assert found == [
        (dataset, "librispeech_clean_wer", 2.12),
        (dataset, "mean_wer", 3.06),
        (dataset, "rtfx", 50.0),
    ]
    assert {entry.date for entry in entries} == {datetime.date.today().isoformat()}
    assert [entry.notes for entry in entries] == [leaderboard.SCORER, leaderboard.SCORER, None]


@pytest.mark.parametrize("entry", ["clean", "=clean", "mean_wer=", "mean_wer=clean+"])
def test_a_wrong_entry_is_explained(entry):
    with pytest.raises(UserError, match="use TASK_ID=SET"):
        leaderboard.parse_results([entry])


def test_a_set_without_the_score_is_named():
    with pytest.raises(UserError, match="the set 'tedlium' has no leaderboard_wer"):
        leaderboard.eval_results({"tedlium_wer": ["tedlium"]}, {"clean": {"leaderboard_wer": 1.0}})
