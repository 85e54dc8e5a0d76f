"""Imports: the same shards by any way there, and every kind of bad data by name."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile

from fastslm_jax.data.ingest import decoding, store
from fastslm_jax.data.ingest import shards as ingest
from fastslm_jax.data.ingest.shards import Settings, import_corpus
from fastslm_jax.data.ingest.store import StoreError
from fastslm_jax.data.manifest import Segment, read_clip, read_manifest
from fastslm_jax.errors import UserError

RATE = 16_000


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))


def write_manifest(folder: pathlib.Path, lines) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return f"jsonl:{folder}/train.jsonl"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Twelve clips of 1 … 2.1 s of noise: wav, flac, ogg and mp3 at three rates, every third in stereo."""
    folder, lines = tmp_path_factory.mktemp("good"), []
    for number in range(12):
        suffix, rate = (
            ("wav", "flac", "ogg", "mp3")[number % 4],
            (16_000, 44_100, 8_000)[number % 3],
        )
        samples = noise(1 + 0.1 * number, number, rate)
        samples = np.stack([samples, samples], axis=1) if number % 3 == 0 else samples
        soundfile.write(folder / f"{number}.{suffix}", samples, rate)
        line = {
            "audio_filepath": f"{number}.{suffix}",
            "duration": 1 + 0.1 * number,
            "text": f"word {number}",
            "id": f"u{number}",
        }
        lines.append(line | {"speaker": number % 2, "recording": "tape"})
    return write_manifest(folder, lines)


def files(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def imported(good, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "train"
    import_corpus(good, out, Settings(shard_clips=5))
    return out


# ------------------------------------------------------------------------------------------------------------------ shards


def test_an_import_is_read_as_a_manifest_is(good, imported):
    assert store.description(imported)["clips"] == 12
    before, after = read_manifest(good.removeprefix("jsonl:")), read_manifest(imported)
    assert [u.id for u in after] == [f"u{number}" for number in range(12)]
    assert [(u.text, u.speaker, u.recording, u.task, u.lang) for u in after] == [
        (u.text, u.speaker, u.recording, u.task, u.lang) for u in before
    ]
    np.testing.assert_allclose(
        [u.seconds for u in after], [u.seconds for u in before], atol=0.1
    )  # mp3 and ogg have their own
    for old, new in zip(before, after, strict=True):
        clip = read_clip(new)
        assert clip.dtype == np.int16
        assert len(clip) == new.num_samples
        if new.seconds == old.seconds:
            np.testing.assert_array_equal(clip, read_clip(old))
    assert sum(new.seconds == old.seconds for old, new in zip(before, after, strict=True)) >= 6


def test_workers_and_interruptions_do_not_change_a_byte(good, imported, tmp_path):
    import_corpus(
        good,
        tmp_path / "two",
        Settings(shard_clips=5),
        run=functools.partial(ingest.run_processes, workers=2),
    )
    assert files(tmp_path / "two") == files(imported)

    def killed(job, numbers):
        """Makes one shard, and half of another: an unfinished file under a temporary name, and no part."""
        numbers = list(numbers)
        ingest.make_shard(job, numbers[-1])
        (job.out / "shard-00000.array_record.1.tmp").write_bytes(b"half")
        shutil.copy(job.shard(numbers[-1]), job.shard(numbers[0]))
        raise KeyboardInterrupt

    made = []

    def count(job, numbers):
        for number in numbers:
            ingest.make_shard(job, number)
            made.append(number)
            yield number

    with pytest.raises(KeyboardInterrupt):
        import_corpus(good, tmp_path / "killed", Settings(shard_clips=5), run=killed)
    with pytest.raises(
        StoreError, match=r"holds no finished import \(dataset.json is missing\); run"
    ):
        read_manifest(tmp_path / "killed")
    import_corpus(good, tmp_path / "killed", Settings(shard_clips=5), run=count)
    assert made == [0, 1]
    assert files(tmp_path / "killed") == files(imported)
    import_corpus(
        good, tmp_path / "killed", Settings(shard_clips=5), run=count
    )  # finished: nothing is done
    assert made == [0, 1]


def test_a_folder_keeps_to_its_settings(good, imported, tmp_path):
    with pytest.raises(
        UserError,
        match="holds an import with another shard_clips; name another --out, or remove it",
    ):
        import_corpus(good, imported, Settings(shard_clips=6))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; name another --out"):
        import_corpus(good, tmp_path)


def test_token_counts_are_the_tokenizers(good, tokenizer_folder, encoder, tmp_path):
    import_corpus(good, tmp_path / "out", Settings(tokenizer=str(tokenizer_folder)))
    utterances = read_manifest(tmp_path / "out")
    assert [u.text_tokens for u in utterances] == [
        len(encoder.answer_ids(u.answer)) - 1 for u in utterances
    ]
    both = [
        len(encoder.answer_ids(["a", u.answer])) - len(encoder.answer_ids("a")) for u in utterances
    ]
    assert [u.joined_tokens for u in utterances] == both
    assert store.description(tmp_path / "out")["tokenizer"] == encoder.fingerprint()


def test_parts_of_a_recording_keep_their_place_and_segments(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(6.0), RATE, subtype="PCM_16")
    segments = [
        {"start": 0.0, "end": 1.0, "text": "one"},
        {"start": 1.0, "end": 2.0, "text": "two"},
    ]
    lines = [
        {
            "audio_filepath": "a.wav",
            "offset": 3.5,
            "duration": 2.0,
            "text": "one two",
            "segments": segments,
        },
        {"audio_filepath": "a.wav", "offset": 0.0, "duration": 1.5, "text": "zero"},
    ]
    import_corpus(write_manifest(tmp_path, lines), tmp_path / "out")
    late, early = read_manifest(tmp_path / "out")
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    np.testing.assert_array_equal(read_clip(late), whole[56_000:88_000])
    np.testing.assert_array_equal(read_clip(early), whole[:24_000])
    np.testing.assert_array_equal(
        read_clip(dataclasses.replace(late, offset=4.0, seconds=0.5)), whole[64_000:72_000]
    )
    assert (late.offset, late.recording, early.offset) == (3.5, "a.wav", 0.0)
    assert late.segments == (Segment(0.0, 1.0, "one"), Segment(1.0, 2.0, "two"))


def test_a_damaged_shard_is_named(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "copy")
    utterance = read_manifest(tmp_path / "copy")[7]
    shard = pathlib.Path(utterance.path)
    assert shard.name == "shard-00001.array_record"
    shard.write_bytes(shard.read_bytes()[: -(1 << 16)])
    with pytest.raises(StoreError, match=r"shard-00001.array_record: .*import it again"):
        read_clip(utterance)
    shard.unlink()
    with pytest.raises(UserError, match=r"audio file .*shard-00001.array_record is missing"):
        read_manifest(tmp_path / "copy")


# ----------------------------------------------------------------------------------------------------------------- sources


def test_librispeech_folders(tmp_path):
    for chapter, texts in (("84-121", ["GO ON", "STAY"]), ("84-12", ["COME"])):
        folder = tmp_path / "dev-clean" / chapter.replace("-", "/")
        folder.mkdir(parents=True)
        lines = [f"{chapter}-{number:04d} {text}\n" for number, text in enumerate(texts)]
        (folder / f"{chapter}.trans.txt").write_text("".join(lines))
        for number in range(len(texts)):
            soundfile.write(folder / f"{chapter}-{number:04d}.flac", noise(1.0, number), RATE)
    import_corpus(f"librispeech:{tmp_path}", tmp_path / "out")
    utterances = read_manifest(tmp_path / "out")
    assert [(u.id, u.text, u.speaker, u.recording) for u in utterances] == [
        ("84-12-0000", "come", "84", "84-12"),
        ("84-121-0000", "go on", "84", "84-121"),
        ("84-121-0001", "stay", "84", "84-121"),
    ]
    assert [u.num_samples for u in utterances] == [RATE] * 3


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(
        UserError, match=r"source 'kaldi:x' is none of jsonl:FILE, librispeech:FOLDER, tfds:NAME"
    ):
        import_corpus("kaldi:x", tmp_path / "out")
    with pytest.raises(UserError, match=r"jsonl:none.jsonl: no such manifest"):
        import_corpus("jsonl:none.jsonl", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"holds no \*.trans.txt; name the folder that was unpacked"
    ):
        import_corpus(f"librispeech:{tmp_path}", tmp_path / "out")
    with pytest.raises(UserError, match="holds no entries"):
        import_corpus(write_manifest(tmp_path, [""]), tmp_path / "out")


def test_tensorflow_datasets(tmp_path):
    import tensorflow_datasets as tfds

    clips = [noise(1.0, seed) for seed in range(3)]

    features = {
        "speech": tfds.features.Audio(sample_rate=8000),
        "text": tfds.features.Text(),
        "speaker_id": np.int64,
    }
    rows = [
        {
            "speech": np.round(clip * 32768).astype(np.int64),
            "text": f"number {number}",
            "speaker_id": 40 + number,
        }
        for number, clip in enumerate(clips)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        "spoken", "1.0.0", tfds.features.FeaturesDict(features), {"test": list(enumerate(rows))}, data_dir=str(tmp_path / "tfds"),
        file_format="array_record",
    )  # fmt: skip
    import_corpus("tfds:spoken:test", tmp_path / "out", data_dir=str(tmp_path / "tfds"))
    utterances = sorted(read_manifest(tmp_path / "out"), key=lambda u: u.text)
    assert [(u.text, u.speaker, u.num_samples) for u in utterances] == [
        (f"number {number}", str(40 + number), 2 * RATE) for number in range(3)
    ]
    assert sorted(u.id for u in utterances) == [
        f"tfds:spoken:test:{number}" for number in (1, 2, 3)
    ]
    expected = decoding.from_float((np.round(clips[0] * 32768) / 32768).astype(np.float32), 8000)
    np.testing.assert_array_equal(read_clip(utterances[0]), expected)


def test_hugging_face_datasets(tmp_path):
    """Parquet files as the Hub has them: audio is a file's bytes and its name."""
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    files = []
    for number in range(3):
        soundfile.write(tmp_path / "a.flac", noise(1.0, number), RATE)
        files.append({"bytes": (tmp_path / "a.flac").read_bytes(), "path": f"{number}.flac"})
    (tmp_path / "spoken").mkdir()
    texts, speakers = [f"number {number}" for number in range(3)], [7, 8, 9]
    table = pyarrow.table({"audio": files, "text": texts, "speaker_id": speakers})
    parquet.write_table(table, tmp_path / "spoken" / "train-00000-of-00001.parquet")
    import_corpus(f"hf:{tmp_path}/spoken", tmp_path / "out")
    utterances = read_manifest(tmp_path / "out")
    assert [(u.text, u.speaker, u.seconds) for u in utterances] == [
        (f"number {n}", str(7 + n), 1.0) for n in range(3)
    ]
    np.testing.assert_array_equal(
        read_clip(utterances[2]), soundfile.read(tmp_path / "a.flac", dtype="int16")[0]
    )


def test_mp4_containers(tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "a.m4a", "w") as file:
        stream = file.add_stream("aac", rate=44_100)
        stream.layout = "mono"
        tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    line = {"audio_filepath": "a.m4a", "duration": 1.0, "text": "a tone"}
    import_corpus(write_manifest(tmp_path, [line]), tmp_path / "out")
    clip = read_clip(read_manifest(tmp_path / "out")[0])
    spectrum = np.abs(np.fft.rfft(clip[4000:12_000]))
    assert spectrum.argmax() * RATE / 8000 == pytest.approx(440, abs=2)


# ---------------------------------------------------------------------------------------------------------------- bad data


def without_tail(path: pathlib.Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: round(keep * len(data))])


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with a manifest of one good line and a bad one of each kind: {name: (line, kind, reason)}."""
    folder = tmp_path_factory.mktemp("bad") / "corpus"
    folder.mkdir()
    names = ["good.wav", "cut.flac", "cut.wav", "nan.wav", "silent.wav", "short.wav", "fast.wav"]
    for name in names:
        soundfile.write(folder / name, noise(2.0), RATE)
    soundfile.write(folder.parent / "outside.wav", noise(2.0), RATE)
    without_tail(folder / "cut.flac", 0.5)
    without_tail(folder / "cut.wav", 0.5)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "none.wav", np.zeros(0), RATE)
    soundfile.write(
        folder / "nan.wav", np.append(noise(1.99), np.full(160, np.nan)), RATE, subtype="FLOAT"
    )
    soundfile.write(folder / "silent.wav", np.zeros(2 * RATE), RATE)

    def line(name: str, text: str = "some words", **fields) -> dict:
        return {
            "audio_filepath": name,
            "duration": 2.0,
            "text": text,
            "id": fields.get("id", name),
            **fields,
        }

    cases = {
        "good": (line("good.wav"), None, None),
        "broken line": ('{"audio_filepath": "good.wav", "dur', "broken_json", r"not JSON \("),
        "half a letter": (
            json.dumps(line("good.wav", "\ud83d", id="g")),
            "broken_json",
            "written again",
        ),
        "no path": (line("a\0b.wav", id="h"), "unreadable", "ValueError"),
        "not an object": ("[1]", "broken_json", "not a JSON object"),
        "missing key": ({"audio_filepath": "good.wav", "text": "a"}, "bad_field", "no 'duration'"),
        "outside": (line("../outside.wav"), "outside_root", "lies outside the manifest's folder"),
        "missing": (line("nowhere.wav"), "missing_file", "no such audio file"),
        "unreadable": (line("text.wav"), "unreadable", "not readable as audio"),
        "truncated flac": (line("cut.flac"), "truncated", "."),
        "truncated wav": (
            line("cut.wav"),
            "truncated",
            "its header announces 64044 bytes, the file has 32022",
        ),
        "empty file": (line("empty.wav"), "zero_length", "the file is empty"),
        "no samples": (line("none.wav"), "zero_length", "the file holds no samples"),
        "NaN": (line("nan.wav"), "not_finite", "holds samples that are not numbers"),
        "zeros": (line("silent.wav"), "silent", "all 2.00 s are digital silence"),
        "longer than said": (
            line("short.wav", duration=1.0),
            "duration_mismatch",
            "holds 2.00 s, its line says 1.00 s",
        ),
        "shorter than said": (
            line("short.wav", offset=1.0),
            "duration_mismatch",
            "holds 2.00 s, its line says 1.00 s to 3.00 s",
        ),
        "no text": (line("good.wav", "  ", id="e"), "empty_text", "the answer is empty"),
        "no transcript": (
            line("good.wav", "", answer="a", id="f"),
            "empty_text",
            "the text is empty",
        ),
        "too much text": (
            line("fast.wav", "word " * 30),
            "text_rate",
            r"74.50 characters of text a second, possible are 0.2 to 40",
        ),
        "duplicate": (
            line("fast.wav", id="good.wav"),
            "duplicate_id",
            "the id is that of train.jsonl:1",
        ),
    }
    spec = write_manifest(folder, [case[0] for case in cases.values()])
    out = folder.parent / "out"
    import_corpus(spec, out, Settings(shard_clips=4), max_reject_fraction=1.0)
    rejected = {
        line["line"]: line
        for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    }
    return cases, rejected, out, spec


BAD = (
    "broken line", "half a letter", "no path", "not an object", "missing key", "outside", "missing", "unreadable",
    "truncated flac", "truncated wav", "empty file", "no samples", "NaN", "zeros", "longer than said", "shorter than said",
    "no text", "no transcript", "too much text", "duplicate",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_kind_of_bad_data_is_named(bad, name):
    cases, rejected, *_ = bad
    _, kind, reason = cases[name]
    line = rejected[1 + list(cases).index(name)]
    assert line["file"] == "train.jsonl"
    assert line["kind"] == kind
    assert kind in decoding.KINDS
    assert re.search(reason, line["reason"]), line["reason"]


def test_the_rest_is_imported_and_nothing_else_rejected(bad):
    cases, rejected, out, _ = bad
    assert set(BAD) == set(cases) - {"good"}
    assert sorted(rejected) == list(range(2, len(cases) + 1))
    assert {line["kind"] for line in rejected.values()} == set(decoding.KINDS)
    assert [u.id for u in read_manifest(out)] == ["good.wav"]


def test_too_many_rejections_fail_the_import_until_they_are_mended(tmp_path):
    for name in ("a", "b", "c", "d"):
        soundfile.write(
            tmp_path / f"{name}.wav", noise(1.0) if name != "b" else np.zeros(RATE), RATE
        )
    spec = write_manifest(
        tmp_path,
        [{"audio_filepath": f"{name}.wav", "duration": 1.0, "text": "yes"} for name in "abcd"],
    )
    message = r"3 clips.*; 1 rejected \(1 silent\), see .*rejected.jsonl: that is 25.0% of 4, allowed is 1.0%; mend them or raise"
    with pytest.raises(UserError, match=message):
        import_corpus(spec, tmp_path / "out", Settings(shard_clips=2))
    assert not (tmp_path / "out" / "dataset.json").exists()
    soundfile.write(tmp_path / "b.wav", noise(1.0), RATE)
    assert import_corpus(spec, tmp_path / "out", Settings(shard_clips=2))["clips"] == 4
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


def test_a_beam_pipeline_writes_the_same_bytes(good, imported, tmp_path):
    pytest.importorskip("apache_beam")
    from fastslm_jax.data.ingest import beam

    run = functools.partial(beam.run, runner="DirectRunner")
    import_corpus(good, tmp_path / "beam", Settings(shard_clips=5), run=run)
    assert files(tmp_path / "beam") == files(imported)
