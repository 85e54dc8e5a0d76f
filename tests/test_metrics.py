"""Scores that can be checked by hand."""

import pytest

from fastslm_jax import metrics


def test_word_and_character_errors():
    """sat → sit is a substitution, the second "the" a deletion: 2 of 6 words; 1 + 4 (with its space) of 22 characters."""
    scores = metrics.asr(["the cat sat on the mat"], ["the cat sit on mat"])
    assert scores["wer"] == pytest.approx(100 * 2 / 6)
    assert scores["cer"] == pytest.approx(100 * 5 / 22)
    assert (scores["substitutions"], scores["insertions"], scores["deletions"], scores["words"]) == (1, 0, 1, 6)


def test_errors_are_pooled_over_the_corpus():
    """1 error of 1 word and 0 of 9: 10 %, not the mean of 100 % and 0 %."""
    right = "anna bought red lamps in vienna late last friday"
    assert metrics.asr(["yes", right], ["no", right])["wer"] == pytest.approx(10.0)


def test_insertions_can_pass_a_hundred_percent():
    assert metrics.asr(["yes"], ["yes yes yes"])["wer"] == pytest.approx(200.0)


def test_english_is_normalised():
    """Case, punctuation, spelling, contractions, numbers and hesitations are no errors."""
    references = ["Mr. O'Neill won't travel.", "The COLOUR is grey!", "um twenty five dollars", "call one two three"]
    hypotheses = ["mister o'neill will not travel", "the color is gray", "$25", "call 123"]
    assert metrics.asr(references, hypotheses)["wer"] == 0


def test_korean_is_kept():
    scores = metrics.asr(["안녕하세요, 세계"], ["안녕하세요 새계"], lang="ko")
    assert scores["wer"] == pytest.approx(50.0)
    assert scores["cer"] == pytest.approx(100 / 8)  # one syllable of seven and a space


def test_silence_in_reference_or_hypothesis():
    assert metrics.asr(["anna left"], [""])["wer"] == 100
    scores = metrics.asr(["anna left", "um"], ["anna left", "yes please"])  # "um" is nothing once normalised
    assert (scores["insertions"], scores["words"], scores["wer"]) == (2, 2, 100)


def test_chrf():
    """abc against abd: 2 of 3 characters, 1 of 2 pairs, 0 of 1 triples, nothing longer: (2/3 + 1/2 + 0) / 3."""
    assert metrics.ast(["abc"], ["abd"])["chrf"] == pytest.approx(100 * 7 / 18)
    same = metrics.ast(["사과 두 개를 주세요"], ["사과 두 개를 주세요"])
    assert same == pytest.approx({"chrf": 100.0, "bleu": 100.0})
    assert metrics.ast(["사과"], ["파리"])["chrf"] == 0


def test_bleu_of_korean_counts_characters():
    """One of eight syllables differs; words as a whole would share no four-gram at all."""
    scores = metrics.ast(["가나다라 마바사아"], ["가나다라 마바사자"])
    assert scores["bleu"] == pytest.approx(100 * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25)


def test_rouge():
    """the cat sat against the cat ran: 2 of 3 words, 1 of 2 pairs, a common run of 2."""
    assert metrics.ssum(["The cat sat"], ["the cat ran"]) == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})
    reversed_and_right = metrics.ssum(["a b c d", "x"], ["d c b a", "x"])
    assert reversed_and_right == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": (0.25 + 1) / 2})


def test_rouge_reads_korean():
    assert metrics.ssum(["편지를 보내세요"], ["편지를 쓰세요"])["rouge1"] == pytest.approx(0.5)


def test_exact_match():
    scores = metrics.sqqa(["Nine.", "in Vienna", "red"], ["nine", "vienna", "Red!"])
    assert scores["em"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("asr", {"wer", "cer", "substitutions", "insertions", "deletions", "words"}),
        ("ast", {"chrf", "bleu"}),
        ("ssum", {"rouge1", "rouge2", "rougeL"}),
        ("sqqa", {"em"}),
    ],
)
def test_scores_by_task(task, names):
    prediction = {"task": task, "lang": "en", "reference": "anna left early", "hypothesis": "anna left"}
    scores = metrics.score([prediction, prediction])
    assert set(scores) == names
    if task == "asr":
        assert scores["wer"] == 33.3333  # rounded for people
        assert scores["deletions"] == 2
