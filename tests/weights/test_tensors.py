"""Reading and writing safetensors files, and atomic folders."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastslm_jax.errors import UserError
from fastslm_jax.weights.tensors import (
    ConversionError,
    SafetensorsSource,
    Tensor,
    atomic_folder,
    check_finite,
    file_format,
    open_file,
    write_safetensors,
    write_sharded,
)

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(6, dtype=np.float16).reshape(1, 6),
    "bfloat": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.0),
    "nothing": np.zeros((0, 4), np.float32),
}


def lazy(arrays):
    return [
        Tensor(key, value.shape, value.dtype, lambda value=value: value)
        for key, value in arrays.items()
    ]


# ---- Files of any name ----


def header(**tensors):
    """A safetensors header: name=(dtype, shape, first byte, last byte)."""
    fields = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
        for name, (dtype, shape, first, last) in tensors.items()
    }
    return json.dumps(fields).encode()


def write_file(path, header, data=b"", length=None):
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin", "a.pth", "weights"])
def test_files_are_opened_by_their_content(name, tmp_path):
    torch = pytest.importorskip("torch")
    save_file({"x": ARRAYS["matrix"]}, tmp_path / name)
    assert file_format(tmp_path / name) == "safetensors"
    np.testing.assert_array_equal(open_file(tmp_path / name).read("x"), ARRAYS["matrix"])
    for zipped in (True, False):  # since PyTorch 1.6, and before
        state = {"x": torch.arange(3.0)}
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert file_format(tmp_path / name) == "torch"
        np.testing.assert_array_equal(open_file(tmp_path / name).read("x"), [0.0, 1.0, 2.0])


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b"GGUF" + b"\0" * 60])
def test_files_of_other_formats(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ConversionError, match="neither a safetensors nor a PyTorch file"):
        open_file(tmp_path / "model.pt")


def test_missing_files_and_folders_without_weights(tmp_path):
    with pytest.raises(ConversionError, match="no such file or folder"):
        open_file(tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"contains no \.safetensors file"):
        open_file(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConversionError, match="not a complete safetensors file"):
        open_file(tmp_path)


GOOD = ("F32", [2], 0, 8)
DAMAGED = {
    "cut header": (b'{"a":{"dty', b"", 500),
    "header of exabytes": (b"{}", b"", 2**60),
    "cut data": (header(a=GOOD), b"\0" * 4, None),
    "overlap": (header(a=GOOD, b=("F32", [2], 4, 12)), b"\0" * 12, None),
    "outside": (header(a=("F32", [200], 0, 800)), b"\0" * 8, None),
    "negative": (header(a=("F32", [2], -8, 0)), b"\0" * 8, None),
    "hole": (header(a=("F32", [2], 4, 12)), b"\0" * 12, None),
    "other size": (header(a=("F32", [3], 0, 8)), b"\0" * 8, None),
    "huge shape": (header(a=("F32", [2**62, 4], 0, 8)), b"\0" * 8, None),
    "shape of text": (header(a=("F32", "x", 0, 8)), b"\0" * 8, None),
    "unknown dtype": (header(a=("F7", [2], 0, 8)), b"\0" * 8, None),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name, tmp_path):
    path = write_file(tmp_path / "a.safetensors", *DAMAGED[name])
    with pytest.raises(ConversionError, match="not a complete safetensors file") as raised:
        open_file(path)
    assert len(str(raised.value).splitlines()) == 1


def test_float8_is_named(tmp_path):
    path = write_file(tmp_path / "a.safetensors", header(a=("F8_E4M3", [2], 0, 2)), b"\0\0")
    source = open_file(path)
    assert (source.dtype("a"), source.shape("a")) == ("F8_E4M3", (2,))
    with pytest.raises(ConversionError, match="tensor a has dtype F8_E4M3, which cannot be read"):
        source.read("a")


INDEXES = {
    "not JSON": (b"{", "cannot be read"),
    "not UTF-8": (b"\xff\xfe\xfa", "cannot be read"),
    "list": (b"[]", "should be a valid dictionary"),
    "no map": (b"{}", "'weight_map' is missing"),
    "map of numbers": (b'{"weight_map": {"x": 5}}', "weight_map.x is 5"),
    "map is a list": (b'{"weight_map": ["x"]}', "weight_map is"),
    "empty map": (b'{"weight_map": {}}', "weight_map is {}"),
    "missing file": (b'{"weight_map": {"x": "b.safetensors"}}', "shard b.safetensors is missing"),
    "parent": (b'{"weight_map": {"x": "../a.safetensors"}}', "outside the folder"),
    "absolute": (b'{"weight_map": {"x": "/a.safetensors"}}', "outside the folder"),
    "long name": (b'{"weight_map": {"x": "' + b"a" * 5000 + b'"}}', "is missing"),
    "folder": (b'{"weight_map": {"x": "."}}', "outside the folder"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_damaged_indexes(name, tmp_path):
    content, message = INDEXES[name]
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ConversionError, match=f"index.json: .*{message}"):
        open_file(tmp_path)


def test_shards_that_the_index_does_not_name_are_not_read(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "a.safetensors")
    save_file({"y": ARRAYS["matrix"]}, tmp_path / "old.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_file(tmp_path).keys() == {"x"}


# ---- PyTorch files ----

TORCH = {
    "sparse": (lambda torch: torch.eye(3).to_sparse(), "is sparse, nested or quantized"),
    "sparse rows": (lambda torch: torch.eye(3).to_sparse_csr(), "is sparse, nested or quantized"),
    "meta": (lambda torch: torch.empty(3, device="meta"), "is without values"),
    "quantized": (
        lambda torch: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "is sparse, nested or quantized",
    ),
    "float8": (lambda torch: torch.ones(3).to(torch.float8_e4m3fn), "has dtype float8_e4m3fn"),
    "complex": (lambda torch: torch.ones(3, dtype=torch.complex64), "has dtype complex64"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCH)
def test_pytorch_tensors_that_cannot_be_read(name, tmp_path):
    torch = pytest.importorskip("torch")
    make, message = TORCH[name]
    torch.save({"ok": torch.zeros(2), "layer.weight": make(torch)}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=f"model.pt: tensor layer.weight {message}"):
        open_file(tmp_path / "model.pt").read("layer.weight")


# ---- NaN and infinity ----


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_only_numbers_are_finite(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.array([[0.0, -0.0, 1.0, -1.0], [largest, -largest, 1e-7, -1e-7]], dtype)
    assert check_finite(values, "file", "x") is values
    assert check_finite(values[:0], "file", "x").size == 0
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for row, column in ((0, 0), (1, 3)):
            damaged = values.copy()
            damaged[row, column] = bad
            for view in (damaged, damaged.T, damaged[row, column].reshape(())):
                with pytest.raises(ConversionError, match=r"^file: tensor x contains NaN or inf"):
                    check_finite(view, "file", "x")
    integers = np.array([2**31 - 1, -1], np.int32)
    assert check_finite(integers, "file", "x") is integers


# ---- Reading and writing ----


def test_written_files_are_readable_by_the_safetensors_library(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", lazy(ARRAYS))
    theirs = load_file(tmp_path / "a.safetensors")
    ours = SafetensorsSource(tmp_path / "a.safetensors")
    assert theirs.keys() == ours.keys() == ARRAYS.keys()
    for key, value in ARRAYS.items():
        for read in (theirs[key], ours.read(key)):
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(read, value)
    assert ours.dtype("bfloat") == "BF16"


def test_slices_are_read_only_views(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        source.read("x", (slice(1, 3), slice(2, 4))), ARRAYS["matrix"][1:3, 2:4]
    )
    with pytest.raises(ValueError, match="read-only"):
        source.read("x")[0] = 1


def test_unaligned_data(tmp_path):
    """Headers may have any length, so tensors may start at odd byte offsets."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)
    data = np.arange(3, dtype=np.float32)
    (tmp_path / "a.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data.tobytes()
    )
    np.testing.assert_array_equal(SafetensorsSource(tmp_path / "a.safetensors").read("x"), data)


def test_duplicate_names_are_not_written(tmp_path):
    tensors = lazy({"x": ARRAYS["matrix"]}) * 2
    with pytest.raises(ConversionError, match="duplicate tensor x"):
        write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConversionError, match="duplicate tensor in two shards"):
        write_sharded(tmp_path, tensors, max_bytes=50)


def test_a_tensor_larger_than_a_shard_gets_its_own_shard(tmp_path):
    tensors = lazy({"a": np.zeros(100), "b": np.zeros(2), "c": np.zeros(2)})
    assert write_sharded(tmp_path, tensors, max_bytes=64) == 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["a"] != index["b"] == index["c"]


def test_model_safetensors_takes_precedence_in_a_folder(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "model.safetensors")
    save_file({"y": ARRAYS["matrix"]}, tmp_path / "case_0.safetensors")
    assert SafetensorsSource(tmp_path).keys() == {"x"}


def test_atomic_folder_appears_on_success_only(tmp_path):
    with atomic_folder(tmp_path / "a/b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/file").read_text() == "x"

    def fail():
        with atomic_folder(tmp_path / "c") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_atomic_folder_does_not_overwrite_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("x")
    with pytest.raises(UserError, match="already exists"), atomic_folder(tmp_path / "a"):
        pass
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty/file").exists()
