"""English sentences with exact Korean translations."""

import random

from fastslm_jax.demo import sentences


def _by_template(template, seeds=range(400)):
    return {drawn.en: drawn.ko for drawn in (template(random.Random(seed)) for seed in seeds)}


def test_korean_translations():
    drawn = {}
    for template in sentences.TEMPLATES:
        drawn |= _by_template(template)
    assert drawn["my sister bought nine flowers and three onions in vienna"] == (
        "제 여동생은 빈에서 꽃 아홉 송이와 양파 세 개를 샀습니다"
    )
    assert (
        drawn["henry will buy nine cups next tuesday"]
        == "헨리는 다음 주 화요일에 컵 아홉 개를 살 것입니다"
    )
    assert (
        drawn["peter sent the invoice to maria on sunday"]
        == "피터는 일요일에 마리아에게 청구서를 보냈습니다"
    )
    assert (
        drawn["david met my uncle at the bakery on monday morning"]
        == "데이비드는 월요일 아침에 빵집에서 제 삼촌을 만났습니다"
    )
    assert drawn["i would like four pears and two hats please"] == "배 네 개와 모자 두 개를 주세요"
    assert drawn["please book a table for eleven people tonight at half past nine"] == (
        "오늘 밤 아홉 시 반에 열한 명이 쓸 자리를 예약해 주세요"
    )
    assert (
        drawn["it was cold and snowy in toronto on friday"]
        == "금요일에 토론토는 춥고 눈이 왔습니다"
    )
    assert (
        drawn["it was seventeen degrees in berlin on thursday"]
        == "목요일에 베를린은 십칠 도였습니다"
    )
    assert drawn["the bus from sydney to seoul leaves at half past twelve"] == (
        "시드니에서 서울로 가는 버스는 열두 시 반에 출발합니다"
    )
    assert drawn["the train to toronto leaves from platform sixteen at half past one"] == (
        "토론토행 기차는 한 시 반에 십육 번 승강장에서 출발합니다"
    )
    assert (
        drawn["please call daniel about the package tomorrow"]
        == "내일 다니엘에게 소포에 대해 전화해 주세요"
    )
    assert (
        drawn["peter paid fifteen dollars for three lamps at the station"]
        == "피터는 역에서 램프 세 개에 십오 달러를 냈습니다"
    )
    assert (
        drawn["henry works at the hotel from eight to four"]
        == "헨리는 여덟 시부터 네 시까지 호텔에서 일합니다"
    )
    assert (
        drawn["my sister visited the office in seoul on saturday"]
        == "제 여동생은 토요일에 서울에 있는 사무실을 방문했습니다"
    )


def test_sentences_are_six_to_twelve_words_without_punctuation():
    for seed in range(300):
        drawn = sentences.sentence(random.Random(seed))
        assert 6 <= len(drawn.en.split()) <= 12
        assert all(c == " " or "a" <= c <= "z" for c in drawn.en)
        assert all(c == " " or "가" <= c <= "힣" for c in drawn.ko)
        assert [" ".join(text.split()) for text in (drawn.en, drawn.ko)] == [drawn.en, drawn.ko]
