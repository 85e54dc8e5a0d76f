"""The synthetic corpus: exact words in both languages, disjoint splits and voices, the same bytes from any number of workers."""

import hashlib
import itertools
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import corpus as synthetic
from fastslm_jax.demo import sentences

COUNTS = {
    "train": {"asr": 12, "ast": 14, "ssum": 6, "sqqa": 6},
    "dev": dict.fromkeys(TASKS, 2),
    "test": dict.fromkeys(TASKS, 3),
    "test_unseen_voices": {"asr": 3},
    "test_long": {"asr": 2},
}


def _digests(out: pathlib.Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def _rows(out: pathlib.Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("corpus") / "one"
    synthetic.build_corpus(
        out, seed=3, counts=COUNTS, workers=1, train=synthetic.Augmentation(0.3, 0.3, 0.3, 0.3)
    )
    return out


def test_lexicon_size():
    words = sentences.lexicon(("asr",))
    assert 200 <= len(words) <= 250
    assert set(words) <= set(sentences.lexicon())
    assert all(
        word.isascii() and word.isalpha() and word == word.lower() for word in sentences.lexicon()
    )


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
    assert sentences.josa(word, pair) == expected


def test_numbers():
    assert [sentences.english_number(n) for n in (7, 12, 20, 42, 99)] == [
        "seven",
        "twelve",
        "twenty",
        "forty two",
        "ninety nine",
    ]
    assert [sentences.sino_number(n) for n in (7, 10, 12, 20, 42, 99)] == [
        "칠",
        "십",
        "십이",
        "이십",
        "사십이",
        "구십구",
    ]


def _by_template(template, seeds=range(400)):
    return {drawn.en: drawn.ko for drawn in (template(random.Random(seed)) for seed in seeds)}


def test_korean_parallels():
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


def test_examples_are_a_function_of_the_rng():
    example = sentences.example("asr", random.Random(1))
    assert example.text == "i would like six eggs and three white lamps please"
    assert example.answer == "i would like six eggs and three white lamps please"
    example = sentences.example("ast", random.Random(1))
    assert example.text == "i would like six eggs and three white lamps please"
    assert example.answer == "달걀 여섯 개와 하얀 램프 세 개를 주세요"
    example = sentences.example("ssum", random.Random(1))
    assert example.text == "note one send the letter to julia note two meet martin at the beach"
    assert example.answer == "two notes send letter meet martin"
    example = sentences.example("sqqa", random.Random(1))
    assert example.text == "julia bought six chairs in berlin how many chairs did julia buy"
    assert example.answer == "six"


def test_sentences_are_six_to_twelve_words_without_punctuation():
    for seed in range(300):
        drawn = sentences.sentence(random.Random(seed))
        assert 6 <= len(drawn.en.split()) <= 12
        assert all(c == " " or "a" <= c <= "z" for c in drawn.en)
        assert all(c == " " or "가" <= c <= "힣" for c in drawn.ko)
        assert [" ".join(text.split()) for text in (drawn.en, drawn.ko)] == [drawn.en, drawn.ko]


def test_summaries_count_and_name_the_notes():
    for seed in range(100):
        example = sentences.example("ssum", random.Random(seed))
        count = example.text.split().count("note")
        first, *rest = example.answer.split()
        assert (sentences.ONES[count], "notes") == (first, rest[0])
        assert len(rest) == 1 + 2 * count
        assert set(rest[1:]) <= set(example.text.split())


def test_answers_are_spoken_in_the_statement():
    for seed in range(300):
        example = sentences.example("sqqa", random.Random(seed))
        assert f" {example.answer} " in f" {example.text} "


def test_text_splits_are_disjoint_for_different_seeds():
    texts = {
        split: {e.text for e in sentences.text_examples(split, seed, 400)}
        for seed, split in enumerate(sentences.SPLITS)
    }
    assert all(
        texts[a].isdisjoint(texts[b]) for a, b in itertools.combinations(sentences.SPLITS, 2)
    )
    assert {split: {sentences.split_of(t) for t in found} for split, found in texts.items()} == {
        s: {s} for s in sentences.SPLITS
    }


def test_notes_and_questions_have_their_words_as_transcripts_too(corpus):
    spoken = {
        row["audio_filepath"]: row
        for row in _rows(corpus, "train")
        if row["task"] in ("ssum", "sqqa")
    }
    rows = [json.loads(line) for line in (corpus / synthetic.TRANSCRIPTS).read_text().splitlines()]
    assert {row["audio_filepath"] for row in rows} == set(spoken)
    for row in rows:
        assert (row["task"], row["lang"], row["prompt"]) == ("asr", "en", TASKS["asr"].instruction)
        assert row["answer"] == row["text"] == spoken[row["audio_filepath"]]["text"]
        assert row["id"] == f"{spoken[row['audio_filepath']]['id']}-asr"


def test_word_times_tell_when_each_word_is_spoken():
    item = synthetic.Item(0, "train", "asr", 3)
    times, seconds = synthetic.word_times(item), len(synthetic.render(item)) / synthetic.SAMPLE_RATE
    text = sentences.example("asr", item.rng(), "train").text
    assert [word for word, _, _ in times] == text.split()
    assert all(start < end for _, start, end in times)
    assert all(
        end == pytest.approx(start) for (_, _, end), (_, start, _) in itertools.pairwise(times)
    )
    assert (times[0][1] < 0.2, times[-1][2]) == (True, pytest.approx(seconds))


def test_word_times_follow_the_words_and_not_their_number():
    """A long word lasts longer than a short one, and a hesitation has its own time."""
    item = synthetic.Item(0, "train", "asr", 5, synthetic.Augmentation(hesitation=1.0, pause=0.0))
    times = synthetic.word_times(item)
    spoken = sentences.example("asr", item.rng(), "train").text.split()
    assert len(times) == len(spoken) + 1
    assert [word for word, _, _ in times if word not in ("um", "uh")] == spoken
    lengths = np.array([len(word) for word, _, _ in times])
    seconds = np.array([end - start for _, start, end in times])
    assert np.corrcoef(lengths, seconds)[0, 1] > 0.3


def test_held_out_voices_were_never_trained():
    train, held_out = synthetic.voices()
    assert (len(train), len(held_out)) == (96, 12)
    assert len({voice.speaker for voice in train + held_out}) == len(train) + len(held_out)
    assert not {voice.name for voice in train} & {voice.name for voice in held_out}
    assert all(150 <= voice.rate <= 195 for voice in train + held_out)


def test_manifests_describe_the_files(corpus):
    speakers = {
        "train": {v.speaker for v in synthetic.voices()[0]},
        "held out": {v.speaker for v in synthetic.voices()[1]},
    }
    sizes = {}
    for name in synthetic.SETS:
        rows = _rows(corpus, name)
        sizes[name] = {task: sum(row["task"] == task for row in rows) for task in COUNTS[name]}
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            samples, rate = soundfile.read(corpus / row["audio_filepath"], dtype="int16")
            assert (rate, samples.ndim) == (16_000, 1)
            assert row["duration"] == len(samples) / rate
            assert row["prompt"] == TASKS[row["task"]].instruction
            assert (
                row["speaker"] in speakers["held out" if name == "test_unseen_voices" else "train"]
            )
            assert 0.09 * 32768 < abs(samples.astype(int)).max() < 0.72 * 32768  # -20 to -3 dBFS
            if name != "test_long":
                assert 1.0 < row["duration"] <= synthetic.MAX_SECONDS[row["task"]]
                assert sentences.split_of(row["text"]) == name.split("_")[0]
    assert sizes == COUNTS


def test_translations_share_the_audio_of_their_sentence(corpus):
    rows = {row["id"]: row for row in _rows(corpus, "train")}
    shared, own = rows["train-ast-000011"], rows["train-ast-000012"]
    different = {key for key, value in shared.items() if value != rows["train-asr-000011"][key]}
    assert different == {"id", "task", "prompt", "answer", "lang"}
    assert shared["lang"] == "ko"
    assert own["audio_filepath"] == "train/train-ast-000012.flac"


def test_long_recordings_have_segments(corpus):
    rows = _rows(corpus, "test_long")
    assert 60.0 <= rows[0]["duration"] <= 67.0
    assert 173.0 <= rows[1]["duration"] <= 180.0
    for row in rows:
        segments = row["segments"]
        assert row["text"] == " ".join(segment["text"] for segment in segments)
        assert all(0.199 <= b["start"] - a["end"] <= 0.601 for a, b in itertools.pairwise(segments))
        assert segments[-1]["end"] < row["duration"]
        assert {sentences.split_of(segment["text"]) for segment in segments} == {"test"}


def test_two_workers_write_the_same_bytes_and_resume(corpus, tmp_path, capsys):
    expected = _digests(corpus)
    arguments = {
        "seed": 3,
        "counts": COUNTS,
        "workers": 2,
        "train": synthetic.Augmentation(0.3, 0.3, 0.3, 0.3),
    }
    synthetic.build_corpus(tmp_path, **arguments)
    assert _digests(tmp_path) == expected
    (tmp_path / "train/train-asr-000005.flac").unlink()
    (tmp_path / "test/test-ssum-000001.flac").unlink()
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "train/.train-asr-000005.flac.tmp").write_bytes(
        b"half a fi"
    )  # what a killed run leaves
    synthetic.build_corpus(tmp_path, **{**arguments, "workers": 1})
    assert _digests(tmp_path) == expected
    capsys.readouterr()
    synthetic.build_corpus(tmp_path, **arguments)
    assert "complete" in capsys.readouterr().out


def test_other_settings_do_not_mix(corpus):
    with pytest.raises(ValueError, match=r"other settings.*seed"):
        synthetic.build_corpus(
            corpus, seed=4, counts=COUNTS, train=synthetic.Augmentation(0.3, 0.3, 0.3, 0.3)
        )
    with pytest.raises(ValueError, match="no examples of task 'ast' in set 'test_long'"):
        synthetic.build_corpus(corpus, counts={"test_long": {"ast": 1}})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=/proc/nothing/here"], "/proc/nothing"),
        (["--out=x", "--utterances=-1"], "utterances"),
        ([], "out"),
        (["--out=x", "y"], "'y'"),
    ],
)
def test_bad_flags_give_one_line_and_exit_2(flags, said, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "fastslm_jax.demo.corpus", *flags],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
