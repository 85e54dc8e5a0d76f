"""Imports go one way: a table of what each top-level module of the package may import."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fastslm_jax"
FOUNDATION = (
    *(
        "audio",
        "audio_files",
        "audio_headers",
        "chips",
        "cli",
        "compiler",
        "config",
        "config_comments",
        "config_schema",
        "devices",
        "distributed",
        "errors",
        "memory",
        "outputs",
        "schema",
        "sharding",
    ),
)
# From the bottom up: a module may import itself, FOUNDATION, and those listed for it.
ALLOWED = {
    "models": (),
    "weights": ("models",),
    "data": ("models", "weights"),
    "flops": ("models", "data"),
    "training": ("models", "weights", "data"),
    "inference": ("models", "weights", "data", "training"),
    "evaluation": ("models", "weights", "data", "training", "inference"),
    "plan": ("models", "weights", "data", "training", "flops"),
    "convert": ("models", "weights", "data", "training", "inference"),
    "synthesis": ("models", "data"),
    "demo": ("models", "weights", "data", "training", "inference", "evaluation", "synthesis"),
    "ablate": (
        *("models", "weights", "data", "flops", "training", "inference", "evaluation"),
        *("synthesis", "demo"),
    ),
    "probes": (
        *("models", "weights", "data", "training", "inference"),
        *("evaluation", "synthesis", "demo"),
    ),
    "transcribe": ("models", "weights", "data", "training", "inference", "transcribe_flags"),
    "transcribe_flags": ("data",),
    "serve": ("models", "weights", "data", "training", "inference", "transcribe"),
    "attention_maps": ("models", "weights", "data", "training", "inference"),
    "inspect": ("models", "weights", "data", "training"),
    "__init__": ("inference",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: pathlib.Path) -> dict[str, int]:
    """{module: line} of the top-level modules that a file imports, inside functions too."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            assert package not in ("configs", "tests"), f"{path}:{node.lineno} imports {name}"
            if package == "fastslm_jax" and parts:
                found[parts[0]] = node.lineno
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_upward(path):
    module = module_of(path)
    allowed = {module, *FOUNDATION, *ALLOWED.get(module, ())}
    for other, line in imported_modules(path).items():
        assert other in allowed, f"{path.relative_to(ROOT)}:{line}: {module} may not import {other}"


def test_every_module_is_in_the_table():
    modules = {module_of(path) for path in FILES}
    assert modules == {*FOUNDATION, *ALLOWED}


def test_no_file_is_long():
    """Files over 400 lines usually have two jobs."""
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert {str(path): count for path, count in lines.items() if count > 400} == {}
