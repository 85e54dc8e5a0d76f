"""Scores that can be checked by hand."""

import pytest

from fastslm_jax.evaluation import metrics


def test_word_and_character_errors():
    """sat → sit and a missing "the": 2 of 6 words, 1 + 4 (with a space) of 22 characters."""
    scores = metrics.asr(["the cat sat on the mat"], ["the cat sit on mat"])
    assert scores["wer"] == pytest.approx(100 * 2 / 6)
    assert scores["cer"] == pytest.approx(100 * 5 / 22)
    assert (
        scores["substitutions"],
        scores["insertions"],
        scores["deletions"],
        scores["words"],
    ) == (1, 0, 1, 6)


def test_errors_are_pooled_over_the_corpus():
    """1 error of 1 word and 0 of 9: 10 %, not the mean of 100 % and 0 %."""
    right = "anna bought red lamps in vienna late last friday"
    assert metrics.asr(["yes", right], ["no", right])["wer"] == pytest.approx(10.0)


def test_insertions_can_exceed_100_percent():
    assert metrics.asr(["yes"], ["yes yes yes"])["wer"] == pytest.approx(200.0)


def test_english_is_normalized():
    """Case, punctuation, spelling, contractions, numbers and hesitations are not errors."""
    references = [
        "Mr. O'Neill won't travel.",
        "The COLOUR is grey!",
        "um twenty five dollars",
        "call one two three",
    ]
    hypotheses = ["mister o'neill will not travel", "the color is gray", "$25", "call 123"]
    assert metrics.asr(references, hypotheses)["wer"] == 0


def test_korean_is_kept():
    scores = metrics.asr(["안녕하세요, 세계"], ["안녕하세요 새계"], lang="ko")
    assert scores["wer"] == pytest.approx(50.0)
    assert scores["cer"] == pytest.approx(100 / 8)  # one syllable of seven and a space


def test_silence_in_reference_or_hypothesis():
    assert metrics.asr(["anna left"], [""])["wer"] == 100
    scores = metrics.asr(
        ["anna left", "um"], ["anna left", "yes please"]
    )  # "um" is removed by normalization
    assert (scores["insertions"], scores["words"], scores["wer"]) == (2, 2, 100)


def test_words_in_clips_without_speech_are_insertions():
    """Two of three clips without speech have an answer, of three words together."""
    scores = metrics.asr(["", "anna left", "", ""], ["you", "anna left", "Thank you.", "."])
    assert (scores["insertions"], scores["words"], scores["wer"]) == (3, 2, 150)
    names = ("no_speech_clips", "no_speech_answered", "no_speech_words")
    assert [scores[name] for name in names] == [3, 2, 3]
    assert metrics.asr(["anna"], ["anna"]).keys().isdisjoint(names)
    silent = {"task": "asr", "lang": "en", "reference": "", "hypothesis": "you"}
    scores = metrics.score([silent, silent], intervals=True)
    assert (scores["wer"], scores["words"], scores["no_speech_words"]) == (200, 0, 2)
    assert "failed" not in scores


def test_chrf():
    """abc against abd: 2 of 3 characters, 1 of 2 pairs, 0 of 1 triples: (2/3 + 1/2 + 0) / 3."""
    assert metrics.ast(["abc"], ["abd"])["chrf"] == pytest.approx(100 * 7 / 18)
    same = metrics.ast(["사과 두 개를 주세요"], ["사과 두 개를 주세요"])
    assert (same["chrf"], same["chrf_pp"], same["bleu"]) == pytest.approx((100.0, 100.0, 100.0))
    assert metrics.ast(["사과"], ["파리"])["chrf"] == 0


def test_bleu_of_korean_counts_characters():
    """One of eight syllables differs; whole words would share no four-gram."""
    scores = metrics.ast(["가나다라 마바사아"], ["가나다라 마바사자"])
    assert scores["bleu"] == pytest.approx(100 * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25)


def test_rouge():
    """the cat sat against the cat ran: 2 of 3 words, 1 of 2 pairs, a common run of 2."""
    assert metrics.ssum(["The cat sat"], ["the cat ran"]) == pytest.approx(
        {"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3}
    )
    reversed_and_right = metrics.ssum(["a b c d", "x"], ["d c b a", "x"])
    assert reversed_and_right == pytest.approx(
        {"rouge1": 1.0, "rouge2": 0.0, "rougeL": (0.25 + 1) / 2}
    )


def test_rouge_reads_korean():
    assert metrics.ssum(["편지를 보내세요"], ["편지를 쓰세요"], "ko")["rouge1"] == pytest.approx(
        0.5
    )


def test_exact_match():
    scores = metrics.sqqa(["Nine.", "in Vienna", "red"], ["nine", "vienna", "Red!"])
    assert scores["em"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("asr", {"wer", "cer", "substitutions", "insertions", "deletions", "words"}),
        (
            "ast",
            {"chrf", "chrf_pp", "bleu", "chrf_signature", "chrf_pp_signature", "bleu_signature"},
        ),
        ("ssum", {"rouge1", "rouge2", "rougeL"}),
        ("sqqa", {"em", "f1"}),
    ],
)
def test_scores_by_task(task, names):
    prediction = {
        "task": task,
        "lang": "en",
        "reference": "anna left early",
        "hypothesis": "anna left",
    }
    scores = metrics.score([prediction, prediction])
    assert set(scores) == names
    if task == "asr":
        assert scores["wer"] == 33.3333  # rounded for people
        assert scores["deletions"] == 2


def test_signatures_name_the_tokenizer_of_the_language():
    tokenizers = {"zh": ("zh", "zh-CN", "zh_TW", "cmn_hant", "yue"), "13a": ("de", "de-AT", "EN")}
    tokenizers["char"] = ("ko", "ko_kr", "ja-JP", "th")
    for lang, tokenizer in ((lang, name) for name in tokenizers for lang in tokenizers[name]):
        scores = metrics.ast(["a b c d"], ["a b c d"], lang)
        assert f"|tok:{tokenizer}|" in scores["bleu_signature"]
        assert "|nw:2|" in scores["chrf_pp_signature"]


def test_chrf_pp_counts_words_too():
    """abc against abd: as chrF, and no shared word: (2/3 + 1/2 + 0 + 0) / 4."""
    assert metrics.ast(["abc"], ["abd"])["chrf_pp"] == pytest.approx(100 * (7 / 6) / 4)


@pytest.mark.parametrize(
    ("lang", "text", "kept"),
    [
        ("ko", "안녕하세요, 세계!", "안녕하세요 세계"),
        ("de", "Käse & Öl.", "käse öl"),
        ("zh", "你好。", "你 好"),
        ("en", "It's 2", "it is 2"),
    ],
)
def test_scripts_and_diacritics_survive_normalization(lang, text, kept):
    assert metrics.normalize(text, lang) == kept


def test_chinese_errors_are_characters():
    scores = metrics.asr(["你好世界"], ["你好 世间"], "zh")
    assert (scores["wer"], scores["cer"]) == (25.0, 25.0)


@pytest.mark.parametrize(
    ("task", "lang", "first"), [("asr", "en", "wer"), ("asr", "ko", "cer"), ("ast", "ko", "chrf")]
)
def test_main_metric(task, lang, first):
    assert metrics.main_metric(task, lang) == first


@pytest.mark.parametrize(
    ("reference", "hypothesis", "f1"),
    [
        ("the red lamp", "a red lamp", 1.0),
        ("red lamp", "two red lamps", 2 / 5),
        ("vienna", "berlin", 0.0),
        ("no no", "no", 2 / 3),
        ("the", "a", 1.0),
    ],
)
def test_word_f1(reference, hypothesis, f1):
    assert metrics.word_f1(reference, hypothesis) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(C) a lamp", "C"), ("D. red", "D"), ("The answer is C.", "C"), ("a lamp", None)],
)
def test_options(text, letter):
    assert metrics.option(text) == letter


def test_accuracy_where_references_are_options():
    scores = metrics.sqqa(["A", "B. two", "(C)"], ["A. one", "C", "the answer is C"])
    assert scores["accuracy"] == pytest.approx(100 * 2 / 3)
    assert "accuracy" not in metrics.sqqa(["A", "anna"], ["A", "anna"])


def test_bootstrap_interval_of_a_rate():
    """200 utterances of 5 words, half with one error: 10 %, standard error 0.71 points."""
    right, wrong = "a b c d e", "a b c d f"
    scores = metrics.asr([right] * 200, [right, wrong] * 100, "de", intervals=True)
    low, high = scores["intervals"]["wer"]
    assert low < 10 < high
    assert 10 - low == pytest.approx(1.96 * 0.707, rel=0.15)
    assert scores == metrics.asr(
        [right] * 200, [right, wrong] * 100, "de", intervals=True
    )  # the same draws every time
    assert metrics.asr([right], [right], "de", intervals=True)["intervals"]["wer"] is None


def test_bootstrap_interval_of_bleu():
    scores = metrics.ast(
        ["가나다라마 바사"] * 10, ["가나다라마 바사"] * 5 + ["가나다라 마아자"] * 5, intervals=True
    )
    for name in ("bleu", "chrf", "chrf_pp"):
        low, high = scores["intervals"][name]
        assert low < scores[name] < high


@pytest.mark.parametrize(
    ("lang", "codes"),
    [("en", ("en-US", "EN", "en_gb", "eng")), ("zh", ("zh-CN", "zh-Hant-TW", "cmn_hans_cn"))],
)
def test_all_codes_of_a_language_give_its_scores(lang, codes):
    texts = {"en": ("it's 20 dollars", "it is $20"), "zh": ("宋朝末年定居粉岭", "宋朝末年定居分岭")}
    reference, hypothesis = texts[lang]

    def score(code, task):
        row = {"task": task, "lang": code, "reference": reference, "hypothesis": hypothesis}
        return metrics.score([row])

    assert score("en", "asr")["wer"] == (0.0 if lang == "en" else 100.0)
    assert score(lang, "asr")["wer"] == (0.0 if lang == "en" else 12.5)
    for task in metrics.SCORERS:
        assert all(score(code, task) == score(lang, task) for code in codes)
    assert {metrics.main_metric("asr", code) for code in codes} == {
        "wer" if lang == "en" else "cer"
    }


def test_an_unknown_language_is_an_error():
    row = {"task": "asr", "lang": "english", "reference": "a", "hypothesis": "a"}
    with pytest.raises(ValueError, match="should be a language code"):
        metrics.score([row])


def test_thai_errors_are_characters():
    """One of seven letters; Whisper's normalizer removes vowel marks."""
    assert metrics.asr(["ผมรักไทย"], ["ผมรัดไทย"], "th-TH")["wer"] == pytest.approx(100 / 7)


WEAK = {
    "reference": ["안나는 금요일에 빈에서 빨간 램프 두 개를 샀다"] * 3 + ["나는 집에 간다"] * 3,
    "hypothesis": ["x", "", "q", "나는 집에 간다", "", "z"],
}


def weak(task: str, **fields) -> list[dict]:
    pairs = zip(WEAK["reference"], WEAK["hypothesis"], strict=True)
    return [
        {"task": task, "lang": "ko", "reference": r, "hypothesis": h} | fields for r, h in pairs
    ]


@pytest.mark.parametrize("lang", ["ko", "de"])
def test_a_weak_translation_model_has_scores_and_intervals(lang):
    """Of the resampled scores, some are zero."""
    scores = metrics.score(weak("ast", lang=lang), intervals=True)
    assert "failed" not in scores
    for name in ("bleu", "chrf", "chrf_pp"):
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high


def test_a_score_that_fails_does_not_cost_the_others(monkeypatch):
    def fail(*_, **__):
        raise TypeError("no such thing")

    monkeypatch.setattr(metrics.BLEU, "corpus_score", fail)
    scores = metrics.score(weak("ast"), intervals=True)
    assert scores["failed"] == {"bleu": "TypeError: no such thing"}
    assert set(scores["intervals"]) == {"chrf", "chrf_pp"}
    monkeypatch.setattr(metrics, "bootstrap", fail)
    scores = metrics.score(weak("asr"), intervals=True)
    assert scores["failed"] == {"intervals": "TypeError: no such thing"}
    assert scores["wer"] > 80
    monkeypatch.setattr(metrics.jiwer, "process_words", fail)
    assert metrics.score(weak("asr")) == {"failed": {"scores": "TypeError: no such thing"}}
