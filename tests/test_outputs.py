"""Outputs are checked before the work starts, and replaced as a whole."""

import pathlib

import pytest

from fastslm_jax import outputs
from fastslm_jax.errors import UserError


def test_a_folder_is_made_with_its_parents(tmp_path):
    assert outputs.check_folder(tmp_path / "a/b", "--out") == tmp_path / "a/b"
    assert list((tmp_path / "a/b").iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / name, tmp_path / name / "x.png"):
        with pytest.raises(UserError, match=f"--out={path}: cannot write files in this folder"):
            outputs.check_folder(path, "--out")
    with pytest.raises(UserError, match="cannot write files in this folder"):
        outputs.check_file(tmp_path / name / "x.png", "--png")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("path", ["gs://bucket/run", pathlib.Path("gs://bucket/run")])
def test_an_address_is_not_a_folder(path):
    with pytest.raises(UserError, match=r"--workdir=gs:/.* is an address, .*; mount the bucket"):
        outputs.check_folder(path, "--workdir")


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(UserError, match=r"--png=.*: is a folder; add the name of the file"):
        outputs.check_file(tmp_path, "--png")


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a.txt"
    outputs.write_text(file, "안녕")
    assert file.read_bytes() == "안녕".encode()
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        outputs.write_text(tmp_path / "b", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]  # nothing is left


def test_text_with_a_file_name_that_is_not_utf8(tmp_path):
    outputs.write_text(tmp_path / "a.txt", b"\xff.wav".decode("utf-8", "surrogateescape"))
    assert (tmp_path / "a.txt").read_text() == "\\udcff.wav"
