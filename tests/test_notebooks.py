"""The notebooks of examples/ run from top to bottom; the training at tiny size."""

import pathlib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")


def run(name: str, changes: dict[str, str] | None = None) -> list[str]:
    """Runs a notebook with changes of its code; what each code cell prints and shows."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    for old, new in (changes or {}).items():
        cells = [cell for cell in notebook.cells if old in cell.source]
        assert len(cells) == 1, f"{name}: {old!r} is in {len(cells)} cells"
        cells[0].source = cells[0].source.replace(old, new)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        "".join(
            output.text
            if output.output_type == "stream" and output.name == "stdout"
            else output.get("data", {}).get("text/plain", "")
            for output in found
        )
        for found in outputs
    ]


def test_transcribe():
    _, _, segments, covered, arrays, partials, translation, answer = run("transcribe.ipynb")
    lines = segments.splitlines()
    assert lines[0].startswith("   0.0 – ")
    assert "it was cool and foggy in prague on sunday afternoon" in lines[0]
    assert covered == "32.0 of 32.0 s, ended by eos\n"
    assert "sunday afternoon" in arrays
    assert len(partials.splitlines()) > 3
    assert any("가" <= letter <= "힣" for letter in translation)
    assert answer.startswith("Answer(text=")


def test_finetune(tmp_path):
    changes = {'OUT = "runs/finetune"\nSTEPS = 60': f'OUT = "{tmp_path}"\nSTEPS = 2'}
    *_, training, evaluation, score, texts = run("finetune.ipynb", changes)
    assert "2" in training
    assert evaluation
    assert score.startswith("word error rate: ")
    before, after = texts.splitlines()
    assert before.startswith("assets/demo_model: it was cool and foggy")
    assert after.startswith(f"{tmp_path}/model: it was cool and foggy")
