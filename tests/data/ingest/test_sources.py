"""Sources other than manifests: LibriSpeech, TensorFlow Datasets and Hugging Face datasets."""

import json

import numpy as np
import pytest
import soundfile
from signals import SECOND, noise

from fastslm_jax.data.ingest import decoding
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.errors import UserError


def test_librispeech_folders(tmp_path):
    for chapter, texts in (("84-121", ["GO ON", "STAY"]), ("84-12", ["COME"])):
        folder = tmp_path / "dev-clean" / chapter.replace("-", "/")
        folder.mkdir(parents=True)
        lines = [f"{chapter}-{number:04d} {text}\n" for number, text in enumerate(texts)]
        (folder / f"{chapter}.trans.txt").write_text("".join(lines))
        for number in range(len(texts)):
            soundfile.write(folder / f"{chapter}-{number:04d}.flac", noise(1.0, number), SECOND)
    import_corpus(f"librispeech:{tmp_path}", tmp_path / "out")
    utterances = read_manifest(tmp_path / "out")
    assert [(u.id, u.text, u.speaker, u.recording) for u in utterances] == [
        ("84-12-0000", "come", "84", "84-12"),
        ("84-121-0000", "go on", "84", "84-121"),
        ("84-121-0001", "stay", "84", "84-121"),
    ]
    assert [u.num_samples for u in utterances] == [SECOND] * 3


def test_librispeech_with_odd_files(tmp_path):
    """Files that a Mac adds, a byte order mark, CRLF, Latin-1, and ids of other chapters."""
    folder, apart = tmp_path / "in/1/2", tmp_path / "in/__MACOSX/1/2"
    folder.mkdir(parents=True)
    apart.mkdir(parents=True)
    for name in ("in/1/2/._1-2.trans.txt", "in/__MACOSX/1/2/._1-2.trans.txt", "in/.DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5\26\7\0\2\377\376Mac OS X")
    lines = [
        "\ufeff1-2-0000 CAFÉ".encode(),
        b"1-2-0001 CAF\xc9",  # Latin-1
        b"3-4-0000 ELSEWHERE",
        b"1-2-../../../x UP",
        b"1-2-0002 MISSING",
        b"1-2-0003",
        b"  ",
        b"1-2-0004 LAST",
    ]
    (folder / "1-2.trans.txt").write_bytes(b"\r\n".join(lines))
    for number in (0, 1, 3, 4):
        soundfile.write(folder / f"1-2-000{number}.flac", noise(1.0), SECOND)
    import_corpus(f"librispeech:{tmp_path}/in", tmp_path / "out", max_reject_fraction=1.0)
    assert [(u.id, u.text) for u in read_manifest(tmp_path / "out")] == [
        ("1-2-0000", "café"),
        ("1-2-0004", "last"),
    ]
    rejections = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").open()]
    assert [(r["line"], r["kind"], r["reason"]) for r in rejections] == [
        (2, "bad_field", "not UTF-8 text (unexpected end of data)"),
        (3, "bad_field", "'3-4-0000' is not 1-2-NUMBER"),
        (4, "bad_field", "'1-2-../../../x' is not 1-2-NUMBER"),
        (5, "missing_file", "no such audio file"),
        (6, "empty_text", "the text is empty"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_manifest_and_its_import_have_the_same_lines(tmp_path, end, mark):
    lines = []
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", noise(1.0), SECOND)
        line = {"audio_filepath": f"{name}.wav", "duration": 1.0, "text": f"the {name}"}
        lines.append(json.dumps(line | {"lang": "pt_BR", "id": name}))
    (tmp_path / "m.jsonl").write_bytes((mark + end.join([lines[0], " ", lines[1]])).encode())
    import_corpus(f"jsonl:{tmp_path}/m.jsonl", tmp_path / "out")
    manifest, imported = read_manifest(tmp_path / "m.jsonl"), read_manifest(tmp_path / "out")
    for found in (manifest, imported):
        assert [(u.id, u.text, u.lang) for u in found] == [
            ("a", "the a", "pt"),
            ("b", "the b", "pt"),
        ]


@pytest.mark.parametrize(
    ("spec", "lang", "message"),
    [
        ("hf:x", "Korean", "--lang=Korean: should be a language code such as en, ko or zh-CN"),
        ("tfds:x", "../x", "--lang=../x: should be a language code"),
        ("jsonl:x", "ko", "--lang=ko: only for tfds: and hf:; a manifest names it in each line"),
    ],
)
def test_the_language_of_a_source_is_checked(tmp_path, spec, lang, message):
    with pytest.raises(UserError, match=message):
        import_corpus(spec, tmp_path / "out", lang=lang)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kaldi:x", r"source 'kaldi:x' is not one of jsonl:FILE, librispeech:FOLDER, tfds:NAME"),
        ("jsonl:none.jsonl", r"jsonl:none.jsonl: no such manifest"),
        ("librispeech:{folder}", r"no \*.trans.txt files; give the folder of the unpacked archive"),
        ("jsonl:{folder}/train.jsonl", r"train.jsonl: has no entries"),
    ],
)
def test_missing_and_empty_sources(write_manifest, tmp_path, spec, message):
    write_manifest(tmp_path, [""])
    with pytest.raises(UserError, match=message):
        import_corpus(spec.format(folder=tmp_path), tmp_path / "out")


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
        "spoken",
        "1.0.0",
        tfds.features.FeaturesDict(features),
        {"test": list(enumerate(rows))},
        data_dir=str(tmp_path / "tfds"),
        file_format="array_record",
    )
    import_corpus("tfds:spoken:test", tmp_path / "out", data_dir=str(tmp_path / "tfds"))
    utterances = sorted(read_manifest(tmp_path / "out"), key=lambda u: u.text)
    assert [(u.text, u.speaker, u.num_samples) for u in utterances] == [
        (f"number {number}", str(40 + number), 2 * SECOND) for number in range(3)
    ]
    ids = {f"tfds:spoken:test:{number}" for number in (1, 2, 3)}
    assert {u.id for u in utterances} == ids
    expected = decoding.from_float((np.round(clips[0] * 32768) / 32768).astype(np.float32), 8000)
    np.testing.assert_array_equal(read_clip(utterances[0]), expected)


def test_hugging_face_datasets(tmp_path):
    """Parquet files as on the Hub: an audio field is a file's name and content."""
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    files = []
    for number in range(3):
        soundfile.write(tmp_path / "a.flac", noise(1.0, number), SECOND)
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
    last, _ = soundfile.read(tmp_path / "a.flac", dtype="int16")
    np.testing.assert_array_equal(read_clip(utterances[2]), last)
