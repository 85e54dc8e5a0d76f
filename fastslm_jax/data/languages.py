"""Language codes: BCP 47 in, the primary language subtag out."""

import functools
import re

import langcodes

# Scripts that are written without spaces between words.
SPACELESS_SCRIPTS = ("Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr")


@functools.cache
def parse(code: str) -> str:
    """The primary language subtag of a language code.

    Case and the separator do not matter; script, region and variants are dropped, and members of a
    macrolanguage that usually go by its code get that code.

    Examples: "en-US" → "en", "EN" → "en", "cmn_hans_cn" → "zh", "yue" → "yue", "iw" → "he".

    Raises:
        ValueError: not the code of a language.
    """
    try:
        tag = langcodes.Language.get(langcodes.standardize_tag(code, macro=True))
    except langcodes.LanguageTagError:
        tag = None
    if tag is None or not tag.is_valid() or not re.fullmatch("[a-z]{2,3}", tag.language or ""):
        raise ValueError("should be a language code such as en, ko or zh-CN")
    return tag.language


@functools.cache
def script(lang: str) -> str:
    """The script that a language is usually written in, for example "Hans" for "zh"."""
    return langcodes.Language.get(lang).maximize().script


def is_spaceless(lang: str) -> bool:
    """Whether a language is written without spaces between words."""
    return script(lang) in SPACELESS_SCRIPTS
