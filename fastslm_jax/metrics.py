"""Scores by task: WER and CER (ASR), chrF and BLEU (AST), ROUGE (SSUM), exact match (SQQA)."""

import functools
from collections.abc import Callable, Sequence

import jiwer
import numpy as np
import sacrebleu
from rouge_score import rouge_scorer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer


@functools.cache
def normalizer(lang: str) -> Callable[[str], str]:
    """Whisper's text normaliser: the English one, or the basic one with diacritics kept."""
    return EnglishTextNormalizer() if lang == "en" else BasicTextNormalizer(remove_diacritics=False)


def _normalized(texts: Sequence[str], lang: str) -> list[str]:
    return [normalizer(lang)(text) for text in texts]


def asr(references: Sequence[str], hypotheses: Sequence[str], lang: str = "en") -> dict[str, float]:
    """Corpus-level word and character error rates in percent, and the counts behind them."""
    references, hypotheses = _normalized(references, lang), _normalized(hypotheses, lang)
    words, characters = jiwer.process_words(references, hypotheses), jiwer.process_characters(references, hypotheses)
    return {
        "wer": 100 * words.wer,
        "cer": 100 * characters.cer,
        "substitutions": words.substitutions,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "words": words.hits + words.substitutions + words.deletions,
    }


def ast(references: Sequence[str], hypotheses: Sequence[str], lang: str = "ko") -> dict[str, float]:
    """sacrebleu's chrF and BLEU (character tokens for languages written without word spaces, and for Korean)."""
    tokenize = {"ko": "char", "ja": "char", "zh": "zh"}.get(lang, "13a")
    return {
        "chrf": sacrebleu.corpus_chrf(hypotheses, [references]).score,
        "bleu": sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenize).score,
    }


class _Whitespace:
    """ROUGE's own tokenizer drops everything outside a-z0-9, and with it every other script."""

    def tokenize(self, text: str) -> list[str]:
        return text.lower().split()


def ssum(references: Sequence[str], hypotheses: Sequence[str], lang: str = "en") -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L F-measures, 0 … 1."""
    del lang
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Whitespace())
    scores = [scorer.score(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ("rouge1", "rouge2", "rougeL")}


def sqqa(references: Sequence[str], hypotheses: Sequence[str], lang: str = "en") -> dict[str, float]:
    """Exact match after normalisation, in percent."""
    pairs = zip(_normalized(references, lang), _normalized(hypotheses, lang), strict=True)
    return {"em": 100 * float(np.mean([reference == hypothesis for reference, hypothesis in pairs]))}


SCORERS = {"asr": asr, "ast": ast, "ssum": ssum, "sqqa": sqqa}


def score(predictions: Sequence[dict]) -> dict[str, float]:
    """Scores of one set: predictions have task, lang, reference and hypothesis; all of one task and language."""
    task, lang = predictions[0]["task"], predictions[0]["lang"]
    scores = SCORERS[task]([p["reference"] for p in predictions], [p["hypothesis"] for p in predictions], lang)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in scores.items()}
