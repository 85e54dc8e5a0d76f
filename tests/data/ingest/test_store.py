"""Damaged folders are reported with the name of the damaged file."""

import json
import pathlib
import shutil

import pytest

from fastslm_jax.data.ingest import store
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.ingest.store import StoreError
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.errors import UserError


def test_damaged_and_missing_shards_are_named(imported, tmp_path):
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


def keep_lines(count):
    return lambda data: b"".join(data.splitlines(keepends=True)[:count])


def change(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("index.jsonl", keep_lines(11), "is not the index that the import wrote"),
        ("index.jsonl", lambda data: data.replace(b"word 3", b"word 4"), "is not the index"),
        ("index.jsonl", lambda data: b"", "is not the index"),
        ("dataset.json", lambda data: b"", "not JSON"),
        ("dataset.json", lambda data: data[:100], "not JSON"),
        ("dataset.json", lambda data: b"[]", r"the content is \[\], should be a valid dictionary"),
        ("dataset.json", lambda data: b"{}", "'clips' is missing"),
        ("dataset.json", change(shards=["../x"]), r"shards\[0\] is \"../x\", should match"),
    ],
)
def test_damaged_metadata(imported, tmp_path, file, damage, message):
    shutil.copytree(imported, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_bytes(damage(path.read_bytes()))
    message = f"{file}: {message}.*; the import is damaged: remove its folder and import it again"
    with pytest.raises(StoreError, match=message):
        read_manifest(tmp_path / "copy")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (keep_lines(11), "index.jsonl: has 11 clips, dataset.json says 12"),
        (lambda data: data.replace(b'"u3"', b'"u2"'), "index.jsonl:4: the id 'u2' occurs twice"),
        (lambda data: data.replace(b'"record": 3', b'"record": -3'), "record is -3, should be"),
        (lambda data: data.replace(b"shard-00000", b"../0"), "shard is .*, should match pattern"),
    ],
)
def test_an_index_without_a_checksum(imported, tmp_path, damage, message):
    """Folders of earlier versions have none."""
    shutil.copytree(imported, tmp_path / "copy")
    dataset, index = tmp_path / "copy/dataset.json", tmp_path / "copy/index.jsonl"
    dataset.write_bytes(change(index_sha256=None)(dataset.read_bytes()))
    assert len(read_manifest(tmp_path / "copy")) == 12
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(StoreError, match=message):
        read_manifest(tmp_path / "copy")


@pytest.mark.parametrize("data", [b"", b"\0\1\2\3" * 256, b"{}\n", None])
def test_damaged_shards(imported, tmp_path, data):
    shutil.copytree(imported, tmp_path / "copy")
    first = read_manifest(tmp_path / "copy")[0]
    shard = pathlib.Path(first.path)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2] if data is None else data)
    with pytest.raises(StoreError, match=r"shard-00000.array_record: .*import it again"):
        read_clip(first)


@pytest.mark.parametrize("content", ["", "[]", "null", "\0"])
def test_damaged_settings(noise_corpus, imported, tmp_path, content):
    shutil.copytree(imported, tmp_path / "copy")
    (tmp_path / "copy/settings.json").write_text(content)
    with pytest.raises(StoreError, match=r"settings.json: .*remove its folder and import it again"):
        import_corpus(noise_corpus, tmp_path / "copy", Settings(shard_clips=5))


def test_the_checksum_is_of_the_index(imported):
    assert store.description(imported)["index_sha256"] == store.checksum(imported / "index.jsonl")
