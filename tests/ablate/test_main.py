"""Experiments run once, resume, and go on after a failed run."""

import json
import pathlib
import textwrap

import pytest

from configs import ablation
from fastslm_jax.ablate import __main__ as ablate
from fastslm_jax.ablate import runs, suites
from fastslm_jax.errors import UserError

TRAIN = """
import pathlib, sys
print(*sys.argv)
pathlib.Path("trace").open("a").write("train " + sys.argv[1] + "\\n")
"""
EVAL = """
import json, pathlib, sys
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:] if "=" in flag)
pathlib.Path("trace").open("a").write("eval " + sys.argv[1] + " " + flags["sets"] + "\\n")
if pathlib.Path("broken").exists() and "pooling" in sys.argv[1]:
    sys.exit("error: broken")
for name in flags["sets"].split(","):
    folder = pathlib.Path(flags["workdir"]) / "eval" / name / "asr"
    folder.mkdir(parents=True)
    scores = {"wer": 12.5, "device": "cpu", "utterances": 2}
    (folder / "metrics.json").write_text(json.dumps(scores))
    lines = [
        {"task": "asr", "lang": "en", "seconds": seconds, "reference": "a b", "hypothesis": text,
         "stop_reason": "eos", "id": str(seconds)}
        for seconds, text in ((29.0, "a b"), (598.0, "a"))
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


class Stage:
    """Of a config with one field."""

    def __init__(self, adapter):
        self.name, self.flags = "stage1", (f"--config={adapter}",)

        class Config:
            steps = 7

        self.config = Config


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Two runs whose train.py and eval.py are the programs above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    (tmp_path / "eval.py").write_text(textwrap.dedent(EVAL))
    costs = {"parameters": {"adapter": 5, "trained": 7, "all": 9}, "flops_per_audio_second": 2e6}
    monkeypatch.setattr(runs, "model_costs", lambda folder: costs)
    sets = {"test": "a.jsonl", "recordings": "b.jsonl"}
    return [
        runs.Run("toy", name, runs.Training(Stage(name), {"model.adapter": name}, 0), sets, True)
        for name in ("hfq", "pooling")
    ]


def trace(tmp_path) -> list[str]:
    lines = (tmp_path / "trace").read_text().splitlines()
    (tmp_path / "trace").unlink()
    return lines


def test_a_failed_run_is_retried_and_a_finished_one_is_not(planned, tmp_path, capsys):
    workdir = tmp_path / "work"
    (tmp_path / "broken").touch()
    workdir.mkdir()
    with pytest.raises(UserError, match="1 of 2 runs failed; the same command retries"):
        ablate.run_all(workdir, "toy", "Which?", planned)
    out, err = capsys.readouterr()
    assert "toy: 2 runs, 0 finished" in out
    assert "[1/2] hfq, seed 0: WER, test 12.5 %, " in out
    log = "work/runs/seed0-stage1-adapter_pooling/eval.log"
    assert "pooling, seed 0: eval failed with exit code 1; fix the error at the end of" in err
    assert (tmp_path / log).read_text() == "error: broken\n"
    assert trace(tmp_path) == [
        *("train --config=hfq", "eval --config=hfq test", "eval --config=hfq recordings"),
        *("train --config=pooling", "eval --config=pooling test"),
    ]

    (tmp_path / "broken").unlink()
    ablate.run_all(workdir, "toy", "Which?", planned)
    assert (
        "toy: 2 runs, 1 finished\n[2/2] pooling, seed 0: WER, test 12.5 %"
        in capsys.readouterr().out
    )
    assert trace(tmp_path) == ["eval --config=pooling test", "eval --config=pooling recordings"]
    lines = [json.loads(line) for line in (workdir / "toy/results.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["hfq", "pooling"]
    assert lines[1]["difference"] == {"stage1": {"model.adapter": "pooling"}}
    assert lines[1]["steps"] == 7
    assert lines[1]["scores"]["test"] == {"wer": 12.5, "utterances": 2}
    assert lines[1]["wer_by_minutes"] == {"0.5": 0.0, "10": 50.0}

    written = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    ablate.run_all(workdir, "toy", "Which?", planned)
    assert "nothing to do: all runs are finished" in capsys.readouterr().out
    assert not (tmp_path / "trace").exists()
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == written


def test_other_settings_in_the_same_folder_are_refused(planned, tmp_path):
    workdir = tmp_path / "work"
    workdir.mkdir()
    ablate.run_all(workdir, "toy", "Which?", planned[:1])
    planned[0].training.stage.flags = ("--config=hfq", "--config.steps=9")
    with pytest.raises(UserError, match=r"was created with other flags .*choose another folder"):
        ablate.run_all(workdir, "toy", "Which?", planned[:1])


def test_only_suites_with_lengths_need_long_recordings(tmp_path):
    config = ablation.get_config(f"1,{tmp_path}")
    stage1 = suites.Stage("stage1", ("--config=configs/ablation.py:1",), config, model=None)
    (tmp_path / "corpus").mkdir()
    paths = [source.path for source in config.data.train.values()]
    for path in (*paths, *config.eval.sets.values()):
        if "recordings" not in path:
            pathlib.Path(path).touch()
    ablate.check_data(stage1, None, has_lengths=False)
    with pytest.raises(UserError, match=r"eval\.sets\.recordings=.*: no such file"):
        ablate.check_data(stage1, None, has_lengths=True)
