"""Damaged shards are reported with their file name."""

import pathlib
import shutil

import pytest

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
