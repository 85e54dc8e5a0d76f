"""The one engine behind every conversion: a layout table in, every tensor accounted for.

A layout is a dict from a path of the parameter tree to a `Rule`. A rule whose key holds "{layer}" maps a stacked leaf
[layers, …] to one tensor per layer.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax.weights.tensors import DTYPES, FLOATS, ConversionError, Tensor, TensorSource


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a leaf lives in a checkpoint: leaf = tensor.transpose(permute), after dropping `lead` axes of size one."""

    key: str
    permute: tuple[int, ...] | None = None
    lead: int = 0

    def to_leaf(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a tensor → shape of the leaf (of one layer of it)."""
        shape = tuple(shape[self.lead :])
        return shape if self.permute is None else tuple(shape[axis] for axis in self.permute)

    def from_leaf(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the leaf (of one layer of it) → shape of the tensor."""
        shape = tuple(
            shape if self.permute is None else (shape[axis] for axis in np.argsort(self.permute))
        )
        return (1,) * self.lead + shape

    def arrange(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor as the leaf (as one layer of it): a view."""
        tensor = tensor.reshape(tensor.shape[self.lead :])
        return tensor if self.permute is None else tensor.transpose(self.permute)


Layout = Mapping[str, Rule]


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A parameter whose parts lie on disk: one tensor, or one for each layer of a stacked leaf. Parts are as in the tree."""

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


def flatten(tree: Mapping) -> dict:
    return flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping) -> dict:
    return unflatten_dict(leaves, sep="/")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of a checkpoint as a part of a leaf: layer None is the whole leaf."""

    path: str
    rule: Rule
    layer: int | None
    shape: tuple[int, ...]  # of the tensor in the checkpoint

    @property
    def key(self) -> str:
        return self.rule.key.format(layer=self.layer)


def _entries(leaves: Mapping, layout: Layout) -> list[_Entry]:
    unmapped = sorted(set(leaves) - set(layout))
    if unmapped:
        raise ConversionError(
            f"the layout has no name for parameter {unmapped[0]} ({len(unmapped)} such)"
        )
    entries = []
    for path, leaf in leaves.items():
        rule = layout[path]
        stacked = "{layer}" in rule.key
        shape = rule.from_leaf(leaf.shape[1:] if stacked else leaf.shape)
        layers = range(leaf.shape[0]) if stacked else (None,)
        entries += [_Entry(path, rule, layer, shape) for layer in layers]
    return entries


def _check(
    source: TensorSource, entries: Sequence[_Entry], ignore: Sequence[str], sizes_from: str
) -> None:
    expected = {entry.key: entry for entry in entries}
    missing = sorted(set(expected) - source.keys())
    hint = f"; the model's sizes come from {sizes_from}" if sizes_from else ""
    if missing:
        raise ConversionError(
            f"{source.path}: tensor {missing[0]} is missing ({len(missing)} such){hint}"
        )
    extra = sorted(
        key
        for key in source.keys() - set(expected)
        if not any(re.fullmatch(pattern, key) for pattern in ignore)
    )
    if extra:
        raise ConversionError(
            f"{source.path}: tensor {extra[0]} has no place in this model ({len(extra)} such){hint}"
        )
    for key, entry in expected.items():
        if source.shape(key) != entry.shape:
            raise ConversionError(
                f"{source.path}: tensor {key} has shape {source.shape(key)}, the model's is {entry.shape}{hint}"
            )
        if source.dtype(key) not in FLOATS:
            raise ConversionError(
                f"{source.path}: tensor {key} has type {source.dtype(key)}, weights are one of {', '.join(FLOATS)}"
            )


def open_leaves(
    source: TensorSource,
    layout: Layout,
    leaves: Mapping,
    ignore: Sequence[str] = (),
    sizes_from: str = "",
) -> dict[str, StoredLeaf]:
    """The parameters of a checkpoint, checked but not read.

    Args:
        source: tensors by name (see `convert.tensors`).
        leaves: {path: anything with a shape}, the parameters that there must be.
        ignore: patterns of tensors that belong to no parameter, such as Whisper's decoder.
        sizes_from: where the expected shapes come from, for error messages.

    Raises:
        ConversionError: names the first missing, extra or misshapen tensor.
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


def _tensor(source: TensorSource, key: str, rule: Rule) -> Tensor:
    """A tensor of a checkpoint, arranged as in the tree."""
    shape, dtype = rule.to_leaf(source.shape(key)), DTYPES[source.dtype(key)]
    return Tensor(key, shape, dtype, lambda: rule.arrange(source.read(key)))


def index(source: TensorSource, layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a checkpoint, whether or not they make a model: {"path" or "path[layer]": tensor}, and unknown names."""
    by_key = {rule.key: (path, rule) for path, rule in layout.items()}
    found, unknown = {}, []
    for key in sorted(source.keys()):
        parts = key.split(".")
        candidates = [(key, "")]
        candidates += [
            (".".join([*parts[:i], "{layer}", *parts[i + 1 :]]), f"[{p}]")
            for i, p in enumerate(parts)
            if p.isdigit()
        ]
        hit = next(((*by_key[name], suffix) for name, suffix in candidates if name in by_key), None)
        if hit is None or source.dtype(key) not in DTYPES:
            unknown.append(key)
            continue
        path, rule, suffix = hit
        fits = rule.permute is None or len(source.shape(key)) == rule.lead + len(rule.permute)
        found[path + suffix] = _tensor(source, key, rule if fits else Rule(key))
    return found, unknown


def load(
    source: TensorSource,
    layout: Layout,
    tree: Mapping,
    ignore: Sequence[str] = (),
    sizes_from: str = "",
) -> dict:
    """Reads a checkpoint into a parameter tree.

    Args:
        tree: the parameters as ShapeDtypeStructs. A leaf with a sharding becomes a jax.Array of which this process reads
            only the slices that its own devices hold; a leaf without becomes a numpy array.

    For the others, and errors, see `open_leaves`.
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
            # Waiting bounds what is held twice, by the reader and by the devices, to one leaf.
            loaded[path] = jax.make_array_from_callback(
                leaf.shape, sharding, read
            ).block_until_ready()
    return unflatten(loaded)


def _reader(
    source: TensorSource, rule: Rule, keys: Sequence[str], leaf
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """read(index of a leaf) → that part of it, taken from disk once however many devices ask for it.

    Tensors are copied in their own order and transposed as a view, which is then resolved on the way to the device: a strided
    copy by numpy takes several times as long as reading the file.
    """
    is_stacked = "{layer}" in rule.key
    axes = tuple(range(len(leaf.shape) - is_stacked))
    permute = rule.permute or axes
    done: dict[tuple, np.ndarray] = {}

    def read(index):
        index = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if index not in done:
            first, last = index[0] if is_stacked else (0, 1)
            in_leaf = [slice(*part) for part in index[is_stacked:]]
            in_tensor = (slice(0, 1),) * rule.lead + tuple(
                in_leaf[axis] for axis in np.argsort(permute)
            )
            shape = tuple(part.stop - part.start for part in in_tensor[rule.lead :])
            out = np.empty((last - first, *shape), leaf.dtype)
            for position, key in enumerate(keys[first:last]):
                out[position] = source.read(key, in_tensor).reshape(shape)
            out = out.transpose(0, *(1 + axis for axis in permute))
            done[index] = out if is_stacked else out[0]
        return done[index]

    return read


def part(leaf: StoredLeaf | jax.Array | np.ndarray, layer: int | None) -> np.ndarray:
    """A leaf (layer None), or one layer of a stacked leaf, as in the tree."""
    if isinstance(leaf, StoredLeaf):
        return leaf.parts[layer or 0].read()
    return np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]


def tensors(
    leaves: Mapping[str, StoredLeaf | jax.Array | np.ndarray], layout: Layout
) -> list[Tensor]:
    """The tensors of parameters {path: leaf} under their names in a layout, in the layout's orientation; read when asked for."""

    def reader(leaf, entry):
        def read():
            value = part(leaf, entry.layer)
            if entry.rule.permute is not None:
                value = value.transpose(np.argsort(entry.rule.permute))
            return np.ascontiguousarray(value.reshape(entry.shape))

        return read

    found = []
    for entry in _entries(leaves, layout):
        leaf = leaves[entry.path]
        dtype = (
            leaf.parts[entry.layer or 0].dtype
            if isinstance(leaf, StoredLeaf)
            else np.dtype(leaf.dtype)
        )
        found.append(Tensor(entry.key, entry.shape, dtype, reader(leaf, entry)))
    return found


def store(tree: Mapping, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter tree under their names in a layout, one at a time; the inverse of `load`."""
    return ((tensor.key, tensor.read()) for tensor in tensors(flatten(tree), layout))
