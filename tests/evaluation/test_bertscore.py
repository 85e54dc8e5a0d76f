"""BERTScore with a tiny random model, and its errors."""

import importlib.util

import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict, results
from fastslm_jax.evaluation.bertscore import BertScore

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "ran"]


def prediction(reference, hypothesis):
    return {
        "task": "ast",
        "lang": "en",
        "seconds": 2.0,
        "source": "die\nkatze",
        "reference": reference,
        "hypothesis": hypothesis,
        "stop_reason": "eos",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("bert_score")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(path / "vocab.txt"), model_max_length=512).save_pretrained(path)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), num_hidden_layers=2, **sizes)
    BertModel(config).save_pretrained(path)
    return str(path)


def test_equal_and_empty_texts_have_known_scores(folder, tmp_path):
    """Equal texts score 1, an empty one 0, two empty ones 1: a mean of 3/4."""
    pairs = [("the cat sat", "the cat sat"), ("", ""), ("the cat", ""), ("cat ran", "cat ran")]
    predictions = [prediction(*pair) for pair in pairs]
    scorer = BertScore(folder, 2)
    found = scorer.score(predictions)
    assert found["bertscore_f1"] == pytest.approx(0.75)
    assert "_L2_no-idf" in found["scorers"]["bertscore_f1"]
    other = scorer.score([prediction("the cat sat", "the cat ran")])["bertscore_f1"]
    assert 0 < other < 1
    scores = results.PredictionLog(tmp_path, {}).finish(predictions, {}, None, scorer)
    assert scores["bertscore_f1"] == pytest.approx(0.75)
    assert scores["intervals"].keys() == {"chrf", "chrf_pp", "bleu", "bertscore_f1"}
    assert scores["scorers"]["bleu"].startswith("sacrebleu ")


def test_a_model_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(UserError, match="best layer of this model is not known; add"):
        BertScore(folder)
    with pytest.raises(UserError, match=f"--bertscore={tmp_path}: cannot be used"):
        BertScore(str(tmp_path), 2)
    with pytest.raises(UserError, match=r"cannot be used \(.*num_layers"):
        BertScore(folder, 7)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e .\[scores\]"):
        BertScore("roberta-large")


def test_translations_are_written_as_comet_reads_them(tmp_path):
    """One line per text: line breaks and other spaces become one space."""
    predictions = [prediction("the cat", "a  cat"), prediction("the\ncat", "")]
    results.PredictionLog(tmp_path, {}).finish(predictions, {}, None)
    texts = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert texts == {
        "source": "die katze\n" * 2,
        "reference": "the cat\n" * 2,
        "hypothesis": "a cat\n\n",
    }
    assert predict.summarize(predictions)["utterances"] == 2
