"""Sources other than manifests: LibriSpeech, TensorFlow Datasets and Hugging Face datasets."""

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
