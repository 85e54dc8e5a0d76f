"""Maps checkpoints of other programs to our parameter tree and back, using a table of names.

A layout maps each path of the parameter tree to a `Rule`. A rule whose key contains "{layer}" maps
a stacked leaf [layers, ...] to one tensor per layer. Reading is strict: a missing, extra or
misshapen tensor is an error.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax.weights.resized_table import ResizedTable
from fastslm_jax.weights.tensors import (
    DTYPES,
    FLOATS,
    ConversionError,
    Tensor,
    TensorSource,
    check_finite,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Name and axis order of a leaf in a checkpoint.

    Attributes:
        key: tensor name, with "{layer}" for stacked leaves.
        permute: leaf = tensor.transpose(permute).
        lead: number of leading size-1 axes that the tensor has and the leaf does not.
    """

    key: str
    permute: tuple[int, ...] | None = None
    lead: int = 0

    def to_leaf(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Tensor shape → shape of the leaf (of one layer, if stacked)."""
        shape = tuple(shape[self.lead :])
        return shape if self.permute is None else tuple(shape[axis] for axis in self.permute)

    def from_leaf(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the leaf (of one layer, if stacked) → tensor shape."""
        axes = range(len(shape)) if self.permute is None else np.argsort(self.permute)
        return (1,) * self.lead + tuple(shape[axis] for axis in axes)

    def arrange(self, tensor: np.ndarray) -> np.ndarray:
        """A view of the tensor with the axes of the leaf."""
        tensor = tensor.reshape(tensor.shape[self.lead :])
        return tensor if self.permute is None else tensor.transpose(self.permute)


Layout = Mapping[str, Rule]


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A parameter on disk, read on demand.

    Attributes:
        shape: shape of the leaf.
        parts: one tensor, or one per layer of a stacked leaf, with the axes of the leaf.
        is_stacked: whether `parts` are layers.
    """

    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]
    is_stacked: bool

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self) -> np.ndarray:
        if not self.is_stacked:
            return self.parts[0].read()
        out = np.empty(self.shape, self.dtype)
        for layer, part in enumerate(self.parts):
            out[layer] = part.read()
        return out


Leaf = StoredLeaf | jax.Array | np.ndarray


def flatten(tree: Mapping) -> dict:
    """Nested dict → {"a/b/c": leaf}."""
    return flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping) -> dict:
    """{"a/b/c": leaf} → nested dict."""
    return unflatten_dict(leaves, sep="/")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One expected tensor: the leaf at `path`, or one layer of it."""

    path: str
    rule: Rule
    layer: int | None  # None: the whole leaf
    shape: tuple[int, ...]  # of the tensor

    @property
    def key(self) -> str:
        return self.rule.key.format(layer=self.layer)


def _entries(leaves: Mapping, layout: Layout) -> list[_Entry]:
    unmapped = sorted(set(leaves) - set(layout))
    if unmapped:
        raise ConversionError(f"the layout has no rule for parameter {summarize(unmapped)}")
    entries = []
    for path, leaf in leaves.items():
        rule = layout[path]
        stacked = "{layer}" in rule.key
        shape = rule.from_leaf(leaf.shape[1:] if stacked else leaf.shape)
        layers = range(leaf.shape[0]) if stacked else (None,)
        entries += [_Entry(path, rule, layer, shape) for layer in layers]
    return entries


def summarize(names: Sequence[str]) -> str:
    """The first name and how many follow, for error messages."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check(
    source: TensorSource | ResizedTable,
    entries: Sequence[_Entry],
    ignore: Sequence[str],
    sizes_from: str,
) -> None:
    """Raises ConversionError unless the source has exactly the expected tensors."""
    expected = {entry.key: entry for entry in entries}
    hint = f" (model sizes are from {sizes_from})" if sizes_from else ""
    missing = sorted(set(expected) - source.keys())
    if missing:
        raise ConversionError(f"{source.path}: missing tensor {summarize(missing)}{hint}")
    extra = sorted(
        key
        for key in source.keys() - set(expected)
        if not any(re.fullmatch(pattern, key) for pattern in ignore)
    )
    if extra:
        raise ConversionError(f"{source.path}: unexpected tensor {summarize(extra)}{hint}")
    for key, entry in expected.items():
        if source.shape(key) != entry.shape:
            raise ConversionError(
                f"{source.path}: tensor {key} has shape {source.shape(key)}, "
                f"expected {entry.shape}{hint}"
            )
        if source.dtype(key) not in FLOATS:
            raise ConversionError(
                f"{source.path}: tensor {key} has dtype {source.dtype(key)}, "
                f"expected one of {', '.join(FLOATS)}"
            )


def open_leaves(
    source: TensorSource | ResizedTable,
    layout: Layout,
    leaves: Mapping,
    ignore: Sequence[str] = (),
    sizes_from: str = "",
) -> dict[str, StoredLeaf]:
    """Checks the parameters of a checkpoint without reading them.

    Args:
        source: the tensors of the checkpoint.
        layout: their names.
        leaves: {path: anything with a shape}, the expected parameters.
        ignore: patterns of tensors to ignore, such as Whisper's decoder.
        sizes_from: where the expected shapes come from, for error messages.

    Raises:
        ConversionError: a tensor is missing, unexpected, misshapen or not floating-point; or, when
            it is read, has NaN or infinite values.
    """
    entries = _entries(leaves, layout)
    _check(source, entries, ignore, sizes_from)
    parts: dict[str, list[Tensor]] = {}
    for entry in entries:
        parts.setdefault(entry.path, []).append(_tensor(source, entry.key, entry.rule))
    return {
        path: StoredLeaf(tuple(leaf.shape), tuple(parts[path]), "{layer}" in layout[path].key)
        for path, leaf in leaves.items()
    }


def _tensor(source: TensorSource | ResizedTable, key: str, rule: Rule) -> Tensor:
    """A tensor of the checkpoint with the axes of its leaf."""
    shape, dtype = rule.to_leaf(source.shape(key)), DTYPES[source.dtype(key)]

    def read() -> np.ndarray:
        return rule.arrange(check_finite(source.read(key), source.path, key))

    return Tensor(key, shape, dtype, read)


def match_tensors(
    source: TensorSource | ResizedTable, layout: Layout
) -> tuple[dict[str, Tensor], list[str]]:
    """Maps every tensor of a checkpoint to our names, even if they do not form a complete model.

    Returns:
        {"path" or "path[layer]": tensor}, and the names unknown to the layout.
    """
    by_key = {rule.key: (path, rule) for path, rule in layout.items()}
    found, unknown = {}, []
    for key in sorted(source.keys()):
        parts = key.split(".")
        candidates = [(key, "")]
        candidates += [
            (".".join([*parts[:i], "{layer}", *parts[i + 1 :]]), f"[{number}]")
            for i, number in enumerate(parts)
            if number.isdigit()
        ]
        match = next(
            ((*by_key[name], suffix) for name, suffix in candidates if name in by_key), None
        )
        if match is None or source.dtype(key) not in DTYPES:
            unknown.append(key)
            continue
        path, rule, suffix = match
        fits = rule.permute is None or len(source.shape(key)) == rule.lead + len(rule.permute)
        found[path + suffix] = _tensor(source, key, rule if fits else Rule(key))
    return found, unknown


def load(
    source: TensorSource | ResizedTable,
    layout: Layout,
    tree: Mapping,
    ignore: Sequence[str] = (),
    sizes_from: str = "",
) -> dict:
    """Reads a checkpoint into a parameter tree.

    Args:
        tree: the parameters as ShapeDtypeStructs. A leaf with a sharding becomes a jax.Array, and
            this process reads only the slices of its own devices. A leaf without one becomes a
            NumPy array.

    See `open_leaves` for the other arguments and the errors.
    """
    leaves = flatten(tree)
    entries = _entries(leaves, layout)
    _check(source, entries, ignore, sizes_from)
    keys: dict[str, list[str]] = {}
    for entry in entries:
        keys.setdefault(entry.path, []).append(entry.key)
    loaded = {}
    for path, leaf in leaves.items():
        read = _reader(source, layout[path], keys[path], leaf)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            loaded[path] = read((slice(None),) * len(leaf.shape))
        else:
            # Blocking keeps at most one leaf in host and device memory at the same time.
            loaded[path] = jax.make_array_from_callback(
                leaf.shape, sharding, read
            ).block_until_ready()
    return unflatten(loaded)


def _reader(
    source: TensorSource | ResizedTable, rule: Rule, keys: Sequence[str], leaf: jax.ShapeDtypeStruct
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from an index of the leaf to that slice; each slice is read from disk once.

    Tensors are copied in their stored axis order, and the transposed view is resolved during the
    transfer to the device: a strided NumPy copy takes several times as long as reading the file.
    """
    is_stacked = "{layer}" in rule.key
    axes = tuple(range(len(leaf.shape) - is_stacked))
    permute = rule.permute or axes
    cache: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if bounds not in cache:
            first, last = bounds[0] if is_stacked else (0, 1)
            in_leaf = [slice(*part) for part in bounds[is_stacked:]]
            in_tensor = tuple(in_leaf[axis] for axis in np.argsort(permute))
            shape = tuple(part.stop - part.start for part in in_tensor)
            out = np.empty((last - first, *shape), leaf.dtype)
            for position, key in enumerate(keys[first:last]):
                value = source.read(key, (slice(0, 1),) * rule.lead + in_tensor)
                out[position] = check_finite(value, source.path, key).reshape(shape)
            out = out.transpose(0, *(1 + axis for axis in permute))
            cache[bounds] = out if is_stacked else out[0]
        return cache[bounds]

    return read


def read_part(leaf: Leaf, layer: int | None) -> np.ndarray:
    """Reads one layer of a stacked leaf, or the whole leaf (layer None)."""
    if isinstance(leaf, StoredLeaf):
        return leaf.parts[layer or 0].read()
    return np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]


def tensors(leaves: Mapping[str, Leaf], layout: Layout) -> list[Tensor]:
    """The parameters {path: leaf} under the names and axis order of a layout, read on demand."""

    def tensor(leaf: Leaf, entry: _Entry) -> Tensor:
        def read() -> np.ndarray:
            value = read_part(leaf, entry.layer)
            if entry.rule.permute is not None:
                value = value.transpose(np.argsort(entry.rule.permute))
            return np.ascontiguousarray(value.reshape(entry.shape))

        source = leaf.parts[entry.layer or 0] if isinstance(leaf, StoredLeaf) else leaf
        return Tensor(entry.key, entry.shape, np.dtype(source.dtype), read)

    return [tensor(leaves[entry.path], entry) for entry in _entries(leaves, layout)]


def store(tree: Mapping, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `load`: yields (name, tensor) one at a time."""
    return ((tensor.key, tensor.read()) for tensor in tensors(flatten(tree), layout))
