"""Vocabulary of the synthetic corpus: English phrases with Korean translations, numbers, josa."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Phrase:
    """An English phrase and its Korean translation. `counter` is the noun's Korean counter word."""

    en: str
    ko: str
    counter: str = ""


def _phrases(table: str) -> tuple[Phrase, ...]:
    """Parses a table: "my_sister 제_여동생, apples 사과 개" (underscores become spaces)."""
    return tuple(
        Phrase(*(field.replace("_", " ") for field in entry.split())) for entry in table.split(",")
    )


NAMES = _phrases(
    "anna 안나, david 데이비드, maria 마리아, peter 피터, laura 로라, kevin 케빈, susan 수잔, "
    "oliver 올리버, helen 헬렌, robert 로버트, emma 에마, lucas 루카스, nina 니나, victor 빅터, "
    "sophie 소피, martin 마틴, grace 그레이스, henry 헨리, julia 줄리아, simon 사이먼, "
    "alice 앨리스, thomas 토머스, clara 클라라, daniel 다니엘"
)
RELATIVES = _phrases(
    "my_sister 제_여동생, my_brother 제_남동생, my_uncle 제_삼촌, my_aunt 제_이모, "
    "my_cousin 제_사촌, my_neighbor 제_이웃"
)
CITIES = _phrases(
    "london 런던, paris 파리, berlin 베를린, seoul 서울, tokyo 도쿄, madrid 마드리드, "
    "boston 보스턴, chicago 시카고, toronto 토론토, sydney 시드니, rome 로마, dublin 더블린, "
    "vienna 빈, oslo 오슬로, busan 부산, athens 아테네, prague 프라하, lisbon 리스본, "
    "cairo 카이로, warsaw 바르샤바"
)
VENUES = _phrases(
    "library 도서관, station 역, market 시장, museum 박물관, hotel 호텔, airport 공항, "
    "park 공원, school 학교, office 사무실, bakery 빵집, cafe 카페, hospital 병원, bank 은행, "
    "theater 극장, beach 해변, garden 정원, zoo 동물원, church 교회"
)
GOODS = _phrases(
    "apples 사과 개, oranges 오렌지 개, eggs 달걀 개, bananas 바나나 개, lemons 레몬 개, "
    "potatoes 감자 개, onions 양파 개, tomatoes 토마토 개, cookies 쿠키 개, "
    "sandwiches 샌드위치 개, coffees 커피 잔, books 책 권, tickets 표 장, postcards 엽서 장, "
    "stamps 우표 장, flowers 꽃 송이, carrots 당근 개, pears 배 개, keys 열쇠 개, cups 컵 개, "
    "newspapers 신문 부"
)
COLORED = _phrases(
    "shirts 셔츠 벌, jackets 재킷 벌, roses 장미 송이, pencils 연필 자루, candles 양초 자루, "
    "notebooks 공책 권, chairs 의자 개, lamps 램프 개, umbrellas 우산 개, hats 모자 개"
)
COLORS = _phrases(
    "red 빨간, blue 파란, green 초록색, white 하얀, black 검은, yellow 노란, purple 보라색, "
    "brown 갈색"
)
DOCUMENTS = _phrases(
    "report 보고서, letter 편지, invoice 청구서, photos 사진, contract 계약서, package 소포, "
    "map 지도, calendar 달력, recipe 요리법"
)
VEHICLES = _phrases("train 기차, bus 버스, flight 비행기, ferry 여객선")
DAYS = _phrases(
    "monday 월요일, tuesday 화요일, wednesday 수요일, thursday 목요일, friday 금요일, "
    "saturday 토요일, sunday 일요일"
)
PARTS = _phrases("morning 아침, afternoon 오후, evening 저녁")
# Temperature: (English, Korean connective form). Sky: (English, Korean future stem, Korean past).
AIR = (("cold", "춥고"), ("warm", "따뜻하고"), ("hot", "덥고"), ("cool", "시원하고"))
SKY = (
    ("sunny", "맑을", "맑았습니다"),
    ("cloudy", "흐릴", "흐렸습니다"),
    ("rainy", "비가 올", "비가 왔습니다"),
    ("snowy", "눈이 올", "눈이 왔습니다"),
    ("windy", "바람이 불", "바람이 불었습니다"),
    ("foggy", "안개가 낄", "안개가 끼었습니다"),
)

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
NATIVE = "_ 한 두 세 네 다섯 여섯 일곱 여덟 아홉 열 열한 열두".split()
SINO = "_ 일 이 삼 사 오 육 칠 팔 구".split()


def josa(word: str, pair: str) -> str:
    """Appends the particle that fits the word's final consonant.

    Examples: ("사과", "을/를") -> "사과를"; ("서울", "으로/로") -> "서울로".
    """
    after_consonant, after_vowel = pair.split("/")
    # A Hangul syllable is 0xAC00 + 28 * (initial, vowel) + final consonant; 0 means no final.
    final = (ord(word[-1]) - 0xAC00) % 28
    is_rieul = final == 8  # ㄹ takes 로 instead of 으로
    if final == 0 or (is_rieul and after_consonant == "으로"):
        return word + after_vowel
    return word + after_consonant


def english_number(n: int) -> str:
    """42 -> "forty two" (0 to 99)."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")


def sino_number(n: int) -> str:
    """Sino-Korean numeral, for prices, degrees and platforms: 42 -> "사십이" (1 to 99)."""
    tens, ones = divmod(n, 10)
    return ("" if tens == 0 else "십" if tens == 1 else SINO[tens] + "십") + (
        SINO[ones] if ones else ""
    )
