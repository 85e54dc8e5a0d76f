"""Korean particles and spoken numbers."""

import pytest

from fastslm_jax.demo import phrases


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ("사과", "을/를", "사과를"),
        ("책", "을/를", "책을"),
        ("안나", "은/는", "안나는"),
        ("마틴", "은/는", "마틴은"),
        ("역", "이/가", "역이"),
        ("파리", "이/가", "파리가"),
        ("런던", "으로/로", "런던으로"),
        ("서울", "으로/로", "서울로"),
        ("파리", "으로/로", "파리로"),
        ("세 개", "과/와", "세 개와"),
        ("두 권", "과/와", "두 권과"),
    ],
)
def test_josa_follows_the_final_consonant(word, pair, expected):
    assert phrases.josa(word, pair) == expected


def test_numbers():
    assert [phrases.english_number(n) for n in (7, 12, 20, 42, 99)] == [
        "seven",
        "twelve",
        "twenty",
        "forty two",
        "ninety nine",
    ]
    assert [phrases.sino_number(n) for n in (7, 10, 12, 20, 42, 99)] == [
        "칠",
        "십",
        "십이",
        "이십",
        "사십이",
        "구십구",
    ]
