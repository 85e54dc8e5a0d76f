"""Language codes as data sets, browsers and locales write them."""

import pytest

from fastslm_jax.data import languages


@pytest.mark.parametrize(
    ("code", "lang"),
    [
        ("en", "en"),
        ("EN", "en"),
        ("en-US", "en"),
        ("en_us", "en"),
        ("eng", "en"),
        ("pt-BR", "pt"),
        ("zh-CN", "zh"),
        ("zh-Hant-TW", "zh"),
        ("cmn", "zh"),
        ("cmn_hans_cn", "zh"),
        ("yue", "yue"),
        ("yue_hant_hk", "yue"),
        ("zh-yue", "yue"),
        ("iw", "he"),
        ("ko_kr", "ko"),
        ("jpn", "ja"),
        ("sr-Latn", "sr"),
        ("ast", "ast"),
        ("ckb_iq", "ckb"),
    ],
)
def test_codes(code, lang):
    assert languages.parse(code) == lang
    assert languages.parse(lang) == lang


@pytest.mark.parametrize(
    "code",
    ["", " ", "xx", "english", "Korean", "klingon", "und", "root", "x-mine", "en/..", "../en"]
    + ["/etc", "en\0", "en\n", "en-", "C", "de_DE.UTF-8", "1", "e" * 5000],
)
def test_other_text_is_an_error(code):
    with pytest.raises(ValueError, match="should be a language code such as en, ko or zh-CN"):
        languages.parse(code)


def test_languages_without_spaces_between_words():
    spaceless = ("zh", "yue", "wuu", "ja", "th", "lo", "km", "my")
    assert all(languages.is_spaceless(lang) for lang in spaceless)
    assert not any(languages.is_spaceless(lang) for lang in ("en", "ko", "vi", "hi", "ar", "he"))
