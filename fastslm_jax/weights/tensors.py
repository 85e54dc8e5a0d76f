"""Named tensors on disk: safetensors files, folders of them, and PyTorch state_dict files.

Files are memory-mapped, so only the requested slices are read. Code in pickles is never executed.
"""

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import ml_dtypes
import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from fastslm_jax import schema
from fastslm_jax.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {  # safetensors name → NumPy dtype
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"  # PEFT's name


class ConversionError(UserError):
    """A checkpoint that does not match its layout. Names the file or tensor and the mismatch."""


class Tensor(NamedTuple):
    """A named tensor that is read on demand."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


# ---- Reading ----


class SafetensorsSource:
    """Tensors of one .safetensors file or of a folder of them, sharded or not.

    In a folder, model.safetensors takes precedence, then the shards named by the index, then every
    .safetensors file. With `adapter`, the folder's PEFT adapter is read too.
    """

    def __init__(self, path: str | os.PathLike, adapter: bool = False) -> None:
        self.path = pathlib.Path(path)
        self._views: dict[str, Callable[[], np.ndarray]] = {}
        self._entries: dict[str, tuple[tuple[int, ...], str]] = {}
        files = _safetensors_files(self.path)
        for file in [*files, self.path / ADAPTER] if adapter else files:
            for key, (shape, dtype, view) in _map_file(file).items():
                if key in self._views:
                    raise ConversionError(
                        f"{file}: tensor {key} is in more than one file of {self.path}"
                    )
                self._entries[key], self._views[key] = (shape, dtype), view

    def keys(self) -> set[str]:
        return set(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key][0]

    def dtype(self, key: str) -> str:
        """The safetensors name of the dtype, such as "BF16"."""
        return self._entries[key][1]

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A read-only view of the mapped file; only the accessed part is loaded."""
        _check_dtype(self, key)
        return self._views[key]()[index]


class TorchSource:
    """Tensors of a state_dict written by `torch.save`. Only tensors are unpickled, never code."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        torch = import_torch(f"{self.path}: reading a PyTorch file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = _load_torch(torch, self.path)
        except pickle.UnpicklingError:
            raise ConversionError(
                f"{self.path}: is damaged or contains code besides tensors, and is not loaded; "
                "use a state_dict of tensors only"
            ) from None
        except Exception as error:  # a damaged file can raise almost any type
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(
                f"{self.path}: not a complete PyTorch file ({reason}); download it again"
            ) from None
        if not isinstance(state, Mapping):
            raise ConversionError(
                f"{self.path}: contains a {type(state).__name__}, expected a state_dict of tensors"
            )
        for key, value in state.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise ConversionError(
                    f"{self.path}: entry {key!r} is of type {type(value).__name__}, expected a "
                    "tensor; use a state_dict of tensors only"
                )
            is_dense = value.layout == torch.strided and not value.is_nested
            if not is_dense or value.is_quantized or value.is_meta:
                kind = "without values" if value.is_meta else "sparse, nested or quantized"
                raise ConversionError(
                    f"{self.path}: tensor {key} is {kind}; save the state_dict with dense tensors"
                )
        self._tensors, self._bfloat16, self._int16 = dict(state), torch.bfloat16, torch.int16

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> str:
        """The safetensors name of the dtype; PyTorch's name if safetensors has none."""
        name = str(self._tensors[key].dtype).removeprefix("torch.")
        try:
            return NAMES[np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)]
        except (TypeError, KeyError):
            return name

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        _check_dtype(self, key)
        tensor = self._tensors[key].detach()
        if tensor.dtype == self._bfloat16:  # torch cannot convert bfloat16 to NumPy directly
            return tensor.view(self._int16).numpy().view(ml_dtypes.bfloat16)[index]
        return tensor.numpy()[index]


TensorSource = SafetensorsSource | TorchSource


def _load_torch(torch: types.ModuleType, path: pathlib.Path) -> object:
    options = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **options)
    except pickle.UnpicklingError:
        raise
    except Exception:  # written before PyTorch 1.6, or named .safetensors: read as a stream
        with open(path, "rb") as stream:
            return torch.load(stream, **options)


def _check_dtype(source: TensorSource, key: str) -> None:
    if source.dtype(key) not in DTYPES:
        raise ConversionError(
            f"{source.path}: tensor {key} has dtype {source.dtype(key)}, which cannot be read; "
            f"expected one of {', '.join(FLOATS)}"
        )


def file_format(path: str | os.PathLike) -> str:
    """ "safetensors" or "torch" by the first bytes of a file, whatever its name; "" for others."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as stream:
        start = stream.read(16)
    if start.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle
        return "torch"
    return "safetensors" if start[8:9] == b"{" else ""


def open_file(path: str | os.PathLike) -> TensorSource:
    """Opens a safetensors file, a folder of them, or a PyTorch file, whatever its name."""
    kind = file_format(path)
    if os.path.isfile(path) and not kind:
        raise ConversionError(f"{path}: neither a safetensors nor a PyTorch file")
    return TorchSource(path) if kind == "torch" else SafetensorsSource(path)


def check_finite(values: np.ndarray, source: object, key: str) -> np.ndarray:
    """Returns the values of a tensor as they are, if they are numbers.

    The bits are compared as integers, without a copy: infinities and NaN are the largest.

    Args:
        source, key: the file and the tensor's name, for the error message.

    Raises:
        ConversionError: a value is NaN or infinite.
    """
    if NAMES[values.dtype] not in FLOATS or not values.size:
        return values
    size = values.dtype.itemsize
    for sign, kind in ((1, "i"), (-1, "u")):  # negative numbers are the largest unsigned integers
        infinity = int(np.array(sign * np.inf).astype(values.dtype).view(f"u{size}"))
        if int(values.view(f"{kind}{size}").max()) >= infinity:
            raise ConversionError(f"{source}: tensor {key} contains NaN or infinite values")
    return values


def import_torch(purpose: str) -> types.ModuleType:
    """Imports PyTorch, which is optional.

    Args:
        purpose: what needs it, for the error message.
    """
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"{purpose} needs PyTorch; run `pip install torch` or use safetensors"
        ) from None
    return torch


def _map_file(
    file: pathlib.Path,
) -> dict[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """{name: (shape, dtype name, function that returns a view of the memory-mapped file)}.

    The safetensors library validates the header. Its own reader copies every tensor, so the views
    are built here.
    """
    try:
        with safe_open(file, framework="np"):
            pass
        with open(file, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(
            f"{file}: not a complete safetensors file ({error}); download it again"
        ) from None
    start = 8 + header_bytes
    has_data = file.stat().st_size > start
    data = np.memmap(file, np.uint8, "r") if has_data else np.empty(start, np.uint8)

    def view_of(entry: dict) -> Callable[[], np.ndarray]:
        first, last = entry["data_offsets"]
        dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
        return lambda: (
            data[start + first : start + last].view(dtype).reshape(shape).view(np.ndarray)
        )

    header.pop("__metadata__", None)
    return {
        key: (
            tuple(entry["shape"]),
            entry["dtype"],
            view_of(entry),
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
    if (path / INDEX).exists():
        return _indexed_files(path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConversionError(f"{path}: contains no .safetensors file")
    return files


class _Index(schema.Schema):
    """model.safetensors.index.json: {name of a tensor: file in the same folder}."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _indexed_files(index: pathlib.Path) -> list[pathlib.Path]:
    """The shards named by a model.safetensors.index.json."""
    try:
        fields = schema.parse_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{index}: cannot be read ({error}); download it again") from None
    names = sorted(set(schema.check(_Index, fields, index, ConversionError).weight_map.values()))
    for name in names:
        if pathlib.PurePath(name).name != name or name in ("", ".", ".."):
            raise ConversionError(
                f"{index}: shard {name!r} is outside the folder of the index; "
                "shards must be in the same folder"
            )
        if not os.path.isfile(index.parent / name):
            raise ConversionError(f"{index}: shard {name} is missing; download it again")
    return [index.parent / name for name in names]


# ---- Writing ----


@contextlib.contextmanager
def atomic_folder(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that is renamed to `out` on success and deleted on failure."""
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; remove it or choose another --out")
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
    """Writes one safetensors file with at most one tensor in memory at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.key in header:
            raise ConversionError(f"{path}: duplicate tensor {tensor.key}")
        header[tensor.key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 64)  # keeps the data aligned
    with open(path, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            value = tensor.read()
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ConversionError(
                    f"{path}: tensor {tensor.key} was read as {value.dtype}{value.shape}, declared "
                    f"as {tensor.dtype}{tensor.shape}"
                )
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def write_sharded(
    folder: str | os.PathLike, tensors: Sequence[Tensor], max_bytes: int = 4 << 30
) -> int:
    """Writes model.safetensors, or shards of at most max_bytes with an index.

    A tensor larger than max_bytes gets its own shard.

    Returns:
        The number of weight files.
    """
    folder = pathlib.Path(folder)
    shards: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in tensors:
        if shards[-1] and sizes[-1] + tensor.nbytes > max_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0])
        return 1
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= {tensor.key: name for tensor in shard}
    if len(weight_map) != len(tensors):
        raise ConversionError(f"{folder}: duplicate tensor in two shards")
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return len(shards)
