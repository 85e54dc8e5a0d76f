"""Every command of the README and of docs/ runs.

The language of a fenced block says how:
  bash      commands that run here as they stand. The folder that they run in has a finished demo
            in runs/demo (its checkpoint is assets/demo_model, its corpus is small), recordings
            FILE and clip.flac, manifests in my/ and DIR/, and small folders of LibriSpeech.
            Trainings take two steps.
  console   a session: the lines after "$ " run, the rest is their output.
  sh        commands for other hardware: the shell parses them, and the trainings and evaluations
            in them run with the demo's pretrained models and small rows.
  python    programs that run; "python fragment" is a part of one.
Blocks of other languages (text, yaml) are not commands.
"""

import itertools
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import fast_compilation
import pytest

from fastslm_jax.data.ingest.importing import import_corpus

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))))
GENERATED = ("docs/tpu_plan.md", "docs/gpu_plan.md")  # by benchmarks/, with the commands that ran
SMALL = "--config.steps=2 --config.log_every=1 --config.data.dev_utterances=1"
SMALL += " --config.checkpoint_every=2"
BASES = "--config.base.whisper=assets/demo_whisper --config.base.llm=assets/demo_llm"
BASES += " --config.model.dtype=float32 --config.model.base_dtype=float32"
TINY = f"{SMALL} {BASES} --config.data.workers=0 --config.model.window_batch=0"
TINY += " --config.data.row.windows=4 --config.data.row.tokens=512 --config.data.row.labels=160"
REAL = f"{SMALL} {BASES} --config.data.workers=0 --config.global_batch_size=1"
REAL += " --config.data.row.windows=6 --config.data.row.tokens=512 --config.data.row.labels=256"
SLICE = "--config.global_batch_size=8 --config.mesh.fsdp=8"
CARD = "--config.global_batch_size=2 --config.accumulate=2"
STAGE1 = "python train.py --config=configs/stage1_shortform.py --workdir=runs/stage1"
STAGE1 += " --config.data.train.asr.path=DIR/train.jsonl"
EIGHT = "--xla_force_host_platform_device_count=8"
COUNTS = "utterances=40 train_ast=8 train_ssum=8 train_sqqa=8 dev=4 test_asr=3 test_ast=1"
COUNTS += " test_ssum=1 test_sqqa=1 test_unseen_voices=1 test_long=1"


def blocks(page: str) -> list[tuple[int, str, str]]:
    """(line, language, content) of the fenced blocks of a page."""
    found, start, language, lines = [], 0, None, []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                start, language, lines = number, line[3:].strip(), []
            else:
                found.append((start, language, "\n".join(lines) + "\n"))
                language = None
        elif language is not None:
            lines.append(line)
    return found


def scripts(language: str, content: str) -> list[tuple[str, int]]:
    """(script, expected exit code) of a block; a command whose output is an error exits with 2."""
    if language == "python":
        return [(f"python - << 'END'\n{content}END\n", 0)]
    if language != "console":
        return [(content, 0)]
    found = []
    for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        command, _, output = re.sub(r"\\\n\s*", "", part).partition("\n")
        found.append((f"{command}\n", 2 if output.startswith("error:") else 0))
    return found


SHELL_BLOCKS = [
    (page, line, language, content)
    for page in PAGES
    for line, language, content in blocks(page)
    if language in ("bash", "console", "sh", "python")
]


def test_every_block_has_a_language():
    for page in PAGES:
        for line, language, _ in blocks(page):
            assert language, f"{page}:{line}: a block without a language"


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: f"{block[0]}:{block[1]}")
def test_the_shell_parses_it(block):
    page, line, language, content = block
    for script, _ in scripts(language, content):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}:{line}: {done.stderr}"
        # A flag at the start of a line belongs to the command before, which ends in a backslash.
        for before, after in itertools.pairwise(script.splitlines()):
            if re.match(r"\s+-", after):
                assert before.endswith("\\"), f"{page}:{line}: {before!r} does not go on"


def trainings(content: str) -> list[str]:
    """The trainings and evaluations in a block for other hardware, also inside of quotes."""
    joined = re.sub(r"\\\n\s*", " ", content)
    found = re.findall(r"python (?:train|eval)\.py[^\"&;|#>\n]*", joined)
    return [command.replace("/mnt/shared", "runs").replace("/shared", "runs") for command in found]


# ------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which the commands run."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("assets", "benchmarks", "configs", "docs", "fastslm_jax", "eval.py", "train.py"):
        (place / name).symlink_to(ROOT / name)
    program = place / "bin/python"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        f"  *train.py*configs/stage*) export XLA_FLAGS='{fast_compilation.FLAGS} {EIGHT}'\n"
        f'    exec {sys.executable} "$@" {TINY} {SLICE} ;;\n'
        f'  *train.py*real_small.py:1*) exec {sys.executable} "$@" {REAL} --config.init_from= ;;\n'
        f'  *train.py*real_small*) exec {sys.executable} "$@" {REAL} ;;\n'
        f'  *train.py*librispeech*) exec {sys.executable} "$@" {TINY} {CARD} ;;\n'
        f'  *eval.py*real_small*) exec {sys.executable} "$@" {BASES} --limit=2 ;;\n'
        f"  *eval.py*configs/stage* | *eval.py*librispeech_finetune*)\n"
        f'    exec {sys.executable} "$@" {BASES} --limit=1 ;;\n'
        f'  *train.py*) exec {sys.executable} "$@" {SMALL} ;;\n'
        f'  *) exec {sys.executable} "$@" ;;\n'
        "esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (place / ".venv").mkdir()
    (place / ".venv/bin").symlink_to(program.parent)
    demo = place / "runs/demo"
    corpus = ["-m", "fastslm_jax.demo.corpus", f"--out={demo}/corpus", "--workers=2"]
    run(place, " ".join(["python", *corpus, *(f"--{count}" for count in COUNTS.split())]))
    for stage in (1, 2, 3):
        shutil.copytree(ROOT / "assets/demo_model", demo / f"stage{stage}")
    recording = next((demo / "corpus/test").glob("*-asr-*.flac"))
    for name in ("clip.flac", "a.flac", "b.flac", "FILE"):
        shutil.copy(recording, place / name)
    (place / "FOLDER").mkdir()
    shutil.copy(recording, place / "FOLDER")
    corpora = ("corpus", "definitions", "words", "pico", "people", "no_speech")
    real = [f"runs/real/{name}" for name in corpora]
    for folder in ("my", "DIR", "data/asr", *real):
        shutil.copytree(demo / "corpus", place / folder)
    for folder in ("people", "no_speech"):
        (place / f"runs/real/{folder}/dev.jsonl").rename(
            place / f"runs/real/{folder}/manifest.jsonl"
        )
    for file in ("corpus/train", "corpus/dev", "people/manifest"):
        run(place, f"python -m fastslm_jax.data.questions runs/real/{file}.jsonl")
    shutil.copy(place / "data/asr/dev.jsonl", place / "data/asr/dev_long.jsonl")
    weights = (ROOT / "assets/demo_llm/model.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(weights[:1000])
    released = f"--workdir={demo}/stage3 --layout=released --out=FastSLM --pt"
    run(place, f"python -m fastslm_jax.convert export {released}")
    for part in ("train-clean-100", "dev-clean", "test-clean", "test-other"):
        chapter = place / f"LibriSpeech/{part}/1/2"
        chapter.mkdir(parents=True)
        ids = [f"1-2-{number:04d}" for number in range(3)]
        for name in ids:
            shutil.copy(recording, chapter / f"{name}.flac")
        lines = [f"{name} ANNA BOUGHT TWO RED LAMPS\n" for name in ids]
        (chapter / "1-2.trans.txt").write_text("".join(lines))
    for name in ("train", "dev"):
        import_corpus(f"jsonl:{demo}/corpus/{name}.jsonl", place / f"runs/data/{name}")
    return place


def run(place: pathlib.Path, script: str, expected: int = 0) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": fast_compilation.FLAGS,
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "FASTSLM_COMPILATION_CACHE": str(place / "cache"),
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = (done.stdout + done.stderr)[-3000:]
    assert done.returncode == expected, f"{script}\n{output}"
    assert "Traceback" not in output, f"{script}\n{output}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_commands_run(page, place):
    for _, line, language, content in [block for block in SHELL_BLOCKS if block[0] == page]:
        print(f"{page}:{line}")  # shown if it fails
        if language != "sh":
            for script, expected in scripts(language, content):
                run(place, script, expected)
            continue
        for command in trainings(content):
            needs_stage1 = re.search(r"init_from=runs/stage1|eval\.py.*=runs/stage1", command)
            if needs_stage1 and not (place / "runs/stage1").exists():
                run(place, STAGE1)
            run(place, command)
