"""Phases of the demo: each completes once, even if the demo is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastslm_jax.demo.phases import Phases
from fastslm_jax.errors import UserError


def test_a_completed_phase_is_skipped(tmp_path, capsys):
    command = ["-c", f"open({str(tmp_path / 'trace')!r}, 'a').write('x')"]
    for _ in range(2):
        Phases(tmp_path).run("corpus", command)
    assert (tmp_path / "trace").read_text() == "x"
    assert "[corpus] already done" in capsys.readouterr().out
    phase = json.loads((tmp_path / "phases.json").read_text())["corpus"]
    assert phase["done"]
    assert phase["seconds"] > 0


def test_a_failed_phase_is_retried_and_its_time_accumulates(tmp_path):
    tried = tmp_path / "tried"
    code = f"import pathlib; p = pathlib.Path({str(tried)!r}); done = p.exists(); p.touch()"
    command = ["-c", f"{code}; exit(0 if done else 3)"]
    message = "stage1 failed with exit code 3; fix the error above and run the same command again"
    with pytest.raises(UserError, match=message):
        Phases(tmp_path).run("stage1", command)
    spent = Phases(tmp_path).state["stage1"]["seconds"]
    phases = Phases(tmp_path)
    phases.run("stage1", command)
    assert phases.state["stage1"]["done"]
    assert phases.state["stage1"]["seconds"] > spent > 0


def test_another_seed_in_the_same_folder_is_rejected(tmp_path):
    Phases(tmp_path).run("corpus", ["-c", "seed = 0"])
    message = r"was created with other flags .*choose another folder or delete it"
    with pytest.raises(UserError, match=message):
        Phases(tmp_path).run("corpus", ["-c", "seed = 1"])


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
def test_a_phase_ends_with_a_killed_parent(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = "import pathlib; from fastslm_jax.demo.phases import Phases; "
    parent += f"Phases(pathlib.Path({str(tmp_path)!r})).run('a', ['-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.time() + 20
    while time.time() < deadline:
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the phase still runs")


def test_the_output_goes_to_a_log(tmp_path, capfd):
    log = tmp_path / "log"
    with pytest.raises(
        UserError, match=f"a failed with exit code 1; fix the error at the end of {log}"
    ):
        Phases(tmp_path).run("a", ["-c", "print(1); exit('no')"], log=log)
    assert sorted(log.read_text().split()) == ["1", "no"]
    assert capfd.readouterr() == ("", "")
