"""Every field of a config with its value and its comment (--print_config)."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from fastslm_jax import config as defaults


def describe(config: ConfigDict) -> list[str]:
    """One line per field: "steps = 100  # of the whole run"."""
    explained, lines = comments(), []
    for path, value in _fields(config):
        parts = path.split(".")
        if parts[:2] == ["data", "train"] and len(parts) > 2:
            parts[2] = "NAME"  # of a source, which the user chose
        # A field without a comment of its own has that of the group it is in.
        groups = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        comment = next((explained[group] for group in groups if group in explained), "")
        lines.append(f"{path} = {value!r}" + (f"  # {comment}" if comment else ""))
    return lines


def _fields(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value.to_dict() if isinstance(value, ConfigDict) else value


def comments() -> dict[str, str]:
    """{path: comment} from the source of fastslm_jax/config.py."""
    source = inspect.getsource(defaults)
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and (path := _path(node.targets[0])):
            found |= _comments(path, node.targets[0], node.value, by_line)
    return found


def _path(target: ast.expr) -> str:
    """ "model" for the target `config.model`; "" for others."""
    text = ast.unparse(target)
    if text == "fields":  # of `config.source`
        return "data.train.NAME"
    return text.removeprefix("config.") if text.startswith("config.") else ""


def _comments(
    path: str, key: ast.expr, value: ast.expr, by_line: Mapping[int, str]
) -> dict[str, str]:
    """The comment on the line where a field begins, and those of the fields inside it."""
    found = {path: by_line[key.lineno]} if key.lineno in by_line else {}
    if isinstance(value, ast.Call) and value.args:  # ConfigDict({…})
        value = value.args[0]
    if isinstance(value, ast.Dict):
        for name, inner in zip(value.keys, value.values, strict=True):
            found |= _comments(f"{path}.{name.value}", name, inner, by_line)
    return found
