"""What all commands share: errors as one line, help and flags before slow imports, UTF-8 output."""

import io
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from fastslm_jax import cli
from fastslm_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def undecodable():
    b"\xff".decode("utf-8")


def missing():
    open("/nowhere/x.json")  # noqa: SIM115


def raises(error):
    def act():
        raise error

    return act


def test_a_flag_for_a_step():
    values = flags.FlagValues()
    cli.define_step("step", "Checkpoint to use", values)
    found = {}
    for given in ("7", "best"):
        values(["command", f"--step={given}"])
        found[given] = values.step
    assert found == {"7": 7, "best": "best"}
    for wrong in ("-1", "newest", "1.5", ""):
        with pytest.raises(flags.IllegalFlagValueError, match="use a step number such as 1000"):
            values(["command", f"--step={wrong}"])


ERRORS = {
    "user error": (raises(UserError("a\nb")), 2, "error: a b\n"),
    "Ctrl-C": (raises(KeyboardInterrupt()), 130, "interrupted\n"),
    "Ctrl-C after a save": (
        raises(KeyboardInterrupt("saved step 3")),
        130,
        "interrupted: saved step 3\n",
    ),
    "missing file": (missing, 2, "error: /nowhere/x.json: No such file or directory\n"),
    "full disk": (
        raises(OSError(28, "No space left on device", "out/a.txt")),
        2,
        "error: out/a.txt: No space left on device; free some space and run the same command again "
        "to resume\n",
    ),
    "full disk, by a library": (
        raises(RuntimeError("RESOURCE_EXHAUSTED: No space left on device [Op:Write]")),
        2,
        "error: output: No space left on device; free some space and run the same command again "
        "to resume\n",
    ),
    "not UTF-8": (undecodable, 2, "error: a text file is not UTF-8 ("),
    "file name": (
        raises(PermissionError(13, "Permission denied", b"\xffa".decode(errors="surrogateescape"))),
        2,
        "error: \\xffa: Permission denied\n",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_an_exit_code(name, capsys):
    act, code, line = ERRORS[name]
    with pytest.raises(SystemExit) as exit_, cli.errors_as_one_line():
        act()
    assert exit_.value.code == code
    written = capsys.readouterr().err
    assert written.startswith(line)
    assert written.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.errors_as_one_line():
        raises(ZeroDivisionError())()


def python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        check=False,
        **options,
    )


START = """
import runpy, sys
sys.path.insert(0, ".")
command, sys.argv[:] = sys.argv[1], sys.argv[1:]
try:
    if command.endswith(".py"):
        runpy.run_path(command, run_name="__main__")
    else:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
finally:
    print("slow:", [name for name in ("jax", "tensorflow", "orbax") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["train.py", "--help"], 0, "  --coordinator: HOST:PORT of process 0"),
        (["train.py"], 2, "error: flags: --config is required; --help lists all flags"),
        (["train.py", "--stepz=3"], 2, "error: flags: Unknown command line flag 'stepz'"),
        (["train.py", "--config=configs/demo.py:1", "--print_config"], 0, "seed = 0  # of"),
        (["fastslm_jax.transcribe"], 2, "Flag --checkpoint must have a value"),
        (["fastslm_jax.plan", "--help"], 0, "  --topology: TPU topology"),
    ],
)
def test_flags_are_checked_before_slow_imports(arguments, code, text):
    done = python(START, *arguments, text=True)
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    assert "slow: []" in done.stdout
    assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_output_is_utf8_whatever_the_locale(environment):
    code = r"from fastslm_jax import cli; cli.parse_flags(); print('\uc548 \udcff')"
    done = python(code, env=os.environ | environment)
    assert done.stdout == "안 \\udcff\n".encode(), done.stderr


def test_a_reader_that_has_enough_ends_a_command_quietly():
    code = "from fastslm_jax import cli; cli.run(lambda _: [print(i) for i in range(100000)])"
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} -c "{code}" | head -1'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", cli.PIPE_CLOSED)


def test_a_bar_of_audio_stays_within_its_total(capsys):
    with cli.AudioBar(2.5, "audio") as bar:
        bar.update(1.1046875)
        bar.update(2.0)  # the file was longer than announced
        assert bar.n == 2.5
    # Into a file, one line at the end.
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("audio: 100%")
    assert "| 2/2 s [" in line


def test_a_bar_in_a_log_file_is_a_line_every_five_minutes(capsys, monkeypatch):
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    clock = [1000.0]
    with cli.Bar(total=3, desc="steps", mininterval=0) as bar:
        for clock[0] in (1299.0, 1301.0, 1302.0):
            bar.update()
            bar.set_postfix(loss="0.5")
            cli.print_above_bars("a line of the log", sys.stderr)
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split("|")[0] for line in lines if line != "a line of the log"]
    assert shown == ["steps:  67%", "steps: 100%"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_is_redrawn_in_place():
    terminal = Terminal()
    with cli.Bar(total=2, desc="steps", mininterval=0, file=terminal) as bar:
        bar.update(2)
    shown = [part.split("|")[0] for part in terminal.getvalue().split("\r") if part.strip()]
    assert shown == ["steps:   0%", "steps: 100%", "steps: 100%"]
