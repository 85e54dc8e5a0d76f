"""The demo's report summarizes the files of a finished demo."""

import json
import pathlib

import pytest

from fastslm_jax.demo import __main__ as demo
from fastslm_jax.demo import report

SCORES = {
    ("test", "asr"): {"wer": 1.5},
    ("test_unseen_voices", "asr"): {"wer": 2.5},
    ("test_long", "asr"): {"wer": 5.25},
    ("test", "asr-swapped"): {"wer": 101.0},
    ("test", "ast"): {"chrf": 91.0},
    ("test", "ssum"): {"rougeL": 0.975},
    ("test", "sqqa"): {"em": 95.0},
}


@pytest.fixture
def finished(tmp_path) -> pathlib.Path:
    """A finished demo: losses that fall from 2 to 0.1 in 20 lines, scores, two answers per set."""
    for stage in demo.STAGES:
        lines = [{"step": 10 * n, "loss": 2.1 - 0.1 * n} for n in range(1, 21)] + [
            {"step": 200, "dev/wer": 4.0}
        ]
        write_lines(tmp_path / stage / "metrics.jsonl", lines)
    for (name, task), scores in SCORES.items():
        parent = tmp_path / "stage3" / "eval" / name / task
        seconds = 100.0 if name == "test_long" else 3.0
        common = {"task": task, "lang": "en", "seconds": seconds, "stop_reason": "eos"}
        answers = [
            common | {"reference": "the boat leaves soon", "hypothesis": hypothesis}
            for hypothesis in ("the boat leaves soon", "the coat leaves soon")
        ]
        write_lines(parent / "predictions.jsonl", answers)
        (parent / "metrics.json").write_text(json.dumps(scores))
    return tmp_path


def write_lines(path: pathlib.Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_summarizes_the_files(finished):
    phases = {
        name: {"seconds": 90.0, "peak_rss_gib": 1.0 + number}
        for number, name in enumerate(demo.STAGES)
    }
    summary = report.write(finished, phases)
    assert json.loads((finished / "report.json").read_text()) == summary
    assert (summary["wer_short"], summary["wer_unseen_voices"]) == (1.5, 2.5)
    assert (summary["wer_long"], summary["wer_wrong_audio"]) == (5.25, 101)
    assert (summary["chrf_ast"], summary["rougeL_ssum"], summary["em_sqqa"]) == (91, 0.975, 95)
    assert (summary["minutes"], summary["peak_rss_gib"]) == (4.5, 3.0)
    # Means of the first and last tenth of the 20 logged losses: two each.
    assert summary["stages"][0] == {
        "name": "stage1",
        "first_loss": 1.95,
        "last_loss": 0.15,
        "minutes": 1.5,
    }
    assert "ASR, recordings of 1-3 minutes   WER 5.25 %" in report.table(summary)
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
