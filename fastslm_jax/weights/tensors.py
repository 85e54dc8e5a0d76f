"""Tensors on disk under their names: safetensors files, folders of them, PyTorch state_dict files.

Nothing is read before it is asked for, and only the asked-for slice of it: files are mapped into memory. Pickles are never
executed.
"""

import contextlib
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fastslm_jax.errors import UserError

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES = {name: np.dtype(value) for name, value in FLOATS.items()} | {
    name: np.dtype(value)
    for name, value in {
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
        "U8": "uint8", "BOOL": "bool",
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class ConversionError(UserError):
    """A checkpoint that is not what its layout says: names the file or tensor and what is wrong with it."""


class Tensor(NamedTuple):
    """A tensor that is read when asked for."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


# ------------------------------------------------------------------------------------------------------------- reading


class SafetensorsSource:
    """Tensors of one .safetensors file or of a folder (model.safetensors, or shards with or without an index)."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._views: dict[str, Callable[[], np.ndarray]] = {}
        self._entries: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in _safetensors_files(self.path):
            for key, (shape, dtype, view) in _map_file(file).items():
                if key in self._views:
                    raise ConversionError(
                        f"{file}: tensor {key} stands in more than one file of {self.path}"
                    )
                self._entries[key], self._views[key] = (shape, dtype), view

    def keys(self) -> set[str]:
        return set(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key][0]

    def dtype(self, key: str) -> str:
        return self._entries[key][1]

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A view of the file: only what is then copied from it is read."""
        return self._views[key]()[index]


class ArraySource:
    """Tensors already in memory: {name: numpy array}."""

    def __init__(self, arrays: dict[str, np.ndarray], path: str | os.PathLike = "state_dict"):
        self.path, self._arrays = pathlib.Path(path), arrays

    def keys(self) -> set[str]:
        return set(self._arrays)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._arrays[key].shape)

    def dtype(self, key: str) -> str:
        return NAMES.get(self._arrays[key].dtype, self._arrays[key].dtype.name)

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self._arrays[key][index]


class TorchSource:
    """Tensors of a state_dict that `torch.save` wrote. Only tensors and containers are unpickled, never code."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        torch = _import_torch(self.path)
        import pickle

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files older than PyTorch 1.6 cannot be mapped
                    state = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ConversionError(
                f"{self.path}: is damaged, or holds code beside tensors; such a file is not opened, fetch a state_dict of tensors"
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(
                f"{self.path}: not a complete PyTorch file ({reason}); fetch it again"
            ) from None
        if not isinstance(state, Mapping):
            raise ConversionError(
                f"{self.path}: holds a {type(state).__name__}, not a state_dict of tensors"
            )
        for key, value in state.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise ConversionError(
                    f"{self.path}: entry {key!r} is a {type(value).__name__}, not a tensor: no state_dict"
                )
        self._tensors, self._bfloat16, self._int16 = dict(state), torch.bfloat16, torch.int16

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> str:
        name = str(self._tensors[key].dtype).removeprefix("torch.")
        try:
            return NAMES[np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)]
        except (TypeError, KeyError):
            return name

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        tensor = self._tensors[key].detach()
        if tensor.dtype == self._bfloat16:  # numpy knows bfloat16 through ml_dtypes only
            return tensor.view(self._int16).numpy().view(ml_dtypes.bfloat16)[index]
        return tensor.numpy()[index]


TensorSource = SafetensorsSource | ArraySource | TorchSource


def open_file(path: str | os.PathLike) -> SafetensorsSource | TorchSource:
    """A .safetensors file, a folder of them, or a PyTorch file (.pt, .pth, .bin)."""
    path = pathlib.Path(path)
    return (
        TorchSource(path)
        if path.is_file() and path.suffix in (".pt", ".pth", ".bin")
        else SafetensorsSource(path)
    )


def _import_torch(path: pathlib.Path):
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"{path}: PyTorch files need PyTorch; pip install torch, or use safetensors"
        ) from None
    return torch


def _map_file(
    file: pathlib.Path,
) -> dict[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """{name: (shape, type, view of the mapped file)}. The library checks the header; the views are ours, for no copy is made."""
    try:
        with safe_open(file, framework="np"):
            pass
        with open(file, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(
            f"{file}: not a complete safetensors file ({error}); fetch it again"
        ) from None
    start = 8 + header_bytes
    data = (
        np.memmap(file, np.uint8, "r") if file.stat().st_size > start else np.empty(start, np.uint8)
    )

    def view_of(entry):
        first, last = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        return lambda: (
            data[start + first : start + last].view(dtype).reshape(entry["shape"]).view(np.ndarray)
        )

    header.pop("__metadata__", None)
    return {
        key: (
            tuple(entry["shape"]),
            entry["dtype"],
            view_of(entry) if entry["dtype"] in DTYPES else lambda: None,
        )
        for key, entry in header.items()
    }


def _safetensors_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConversionError(f"{path}: no such file or folder")
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ConversionError(f"{path}: holds no .safetensors file")
        return files
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConversionError(
            f"{index}: not a safetensors index (no weight_map); fetch it again"
        ) from None
    files = []
    for name in names:
        if (
            not isinstance(name, str)
            or pathlib.PurePath(name).name != name
            or name in ("", ".", "..")
        ):
            raise ConversionError(
                f"{index}: names {name!r}, which leaves the folder; an index may name files beside it only"
            )
        if not (path / name).is_file():
            raise ConversionError(
                f"{index}: names the shard {name}, which is missing; fetch it again"
            )
        files.append(path / name)
    return files


# ------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def finished_folder(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and is removed when it does not."""
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it, or name another --out")
    temporary = out.absolute().parent / f".{out.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_safetensors(path: str | os.PathLike, tensors: Sequence[Tensor]) -> None:
    """One safetensors file, written tensor by tensor: no more than one of them is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.key in header:
            raise ConversionError(f"{path}: tensor {tensor.key} comes twice")
        size = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[tensor.key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 64)  # data begins at a multiple of 64 bytes
    with open(path, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            value = tensor.read()
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ConversionError(
                    f"{path}: tensor {tensor.key} is {value.dtype}{value.shape}, not as its header says"
                )
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def write_sharded(
    folder: str | os.PathLike, tensors: Sequence[Tensor], max_bytes: int = 4 << 30
) -> int:
    """model.safetensors, or shards of up to max_bytes each with their index. Returns the number of files with weights."""
    folder = pathlib.Path(folder)
    shards: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in tensors:
        size = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        if shards[-1] and sizes[-1] + size > max_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += size
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0])
        return 1
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {tensor.key: name for tensor in shard}
    if len(weight_map) != len(tensors):
        raise ConversionError(f"{folder}: a tensor comes twice")
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return len(shards)
