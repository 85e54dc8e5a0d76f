"""The demo's phases: each is done once, whatever ends the demo in between."""

import json

import pytest

from fastslm_jax.demo import __main__ as demo
from fastslm_jax.errors import UserError


def test_a_phase_that_is_done_is_not_run_again(tmp_path, capsys):
    command = ["-c", f"open({str(tmp_path / 'trace')!r}, 'a').write('x')"]
    for _ in range(2):
        demo.Phases(tmp_path).run("corpus", command)
    assert (tmp_path / "trace").read_text() == "x"
    assert "[corpus] done before" in capsys.readouterr().out
    phase = json.loads((tmp_path / "phases.json").read_text())["corpus"]
    assert phase["done"]
    assert phase["seconds"] > 0


def test_a_phase_that_failed_is_run_again_and_its_time_adds_up(tmp_path):
    tried = tmp_path / "tried"
    command = [
        "-c",
        f"import pathlib; p = pathlib.Path({str(tried)!r}); code = 3 * (not p.exists()); p.touch(); exit(code)",
    ]
    with pytest.raises(
        UserError,
        match="stage1 stopped with exit code 3; mend what it says above and run the same command again",
    ):
        demo.Phases(tmp_path).run("stage1", command)
    spent = demo.Phases(tmp_path).state["stage1"]["seconds"]
    phases = demo.Phases(tmp_path)
    phases.run("stage1", command)
    assert phases.state["stage1"]["done"]
    assert phases.state["stage1"]["seconds"] > spent > 0


def test_another_seed_in_the_same_folder_is_refused(tmp_path):
    demo.Phases(tmp_path).run("corpus", ["-c", "seed = 0"])
    with pytest.raises(
        UserError, match=r"was made with other flags .*name another --out, or remove it"
    ):
        demo.Phases(tmp_path).run("corpus", ["-c", "seed = 1"])
