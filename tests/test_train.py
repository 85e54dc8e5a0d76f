"""train.py on a tiny experiment: metrics, dev scores, interruptions, and errors at start-up."""

import gc
import json
import os
import re
import resource
import shutil
import signal
import time
import types
import weakref

import jax
import numpy as np
import pytest
import tiny_experiment
from absl import logging as absl_logging

import train
from fastslm_jax import memory
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics, predict
from fastslm_jax.inference import load
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.training.logging import JsonLinesWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_experiment.write(folder / "experiment")
    tiny_experiment.cache_programs(folder / "cache")
    yield folder / "experiment"
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def run(folder):
    """run(workdir, {field: value}): train.py in this process, on one device, two rows per step."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jax, "devices", lambda devices=jax.devices()[:1]: devices)
    build, shared = train.specs.build, {}

    def build_once(setup, mesh):
        """Runs with equal steps share one function, so that it is traced once."""
        config = train.FLAGS.config
        fields = ("model", "optimizer", "trainable", "steps", "seed", "global_batch_size")
        fields += ("accumulate", "loss_chunk")
        key = (str([config[field] for field in fields]), str(config.data.row), mesh)
        if key not in shared:
            shared[key] = build(setup, mesh)
        return shared[key]

    patch.setattr(train.specs, "build", build_once)

    def run(workdir, changes=None):
        config = tiny_experiment.get_config(str(folder))
        with config.unlocked():
            config.update_from_flattened_dict(changes or {})
        given = dict.fromkeys(("coordinator", "num_processes", "process_id"))
        patch.setattr(
            train,
            "FLAGS",
            types.SimpleNamespace(config=config.lock(), workdir=str(workdir), **given),
        )
        train.main(None)
        return tiny_experiment.losses(workdir)

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """A working directory after six steps, with checkpoints of steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, {"profile": "2:3"})
    return workdir


@pytest.fixture
def at_step_4(undisturbed, tmp_path):
    """A copy of it as of step 4."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    return tmp_path / "run"


@pytest.fixture
def said(monkeypatch):
    """Warnings and errors."""
    lines = []
    for level in ("warning", "error"):
        monkeypatch.setattr(absl_logging, level, lambda text, *values: lines.append(text % values))
    return lines


def on_batch(monkeypatch, number: int, act) -> None:
    """Calls act() when train.py asks for its batch of that number (from 1)."""
    batches = train.loader.batches

    def watched(*args, **options):
        for drawn, batch in enumerate(batches(*args, **options), start=1):
            if drawn == number:
                act()
            yield batch

    monkeypatch.setattr(train.loader, "batches", watched)


# ----------------------------------------------------------------------------------------- metrics


def test_metrics_of_a_run(undisturbed):
    first, *lines = [
        json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()
    ]
    assert first["compile_seconds"] > 0
    assert [line["step"] for line in lines] == [2, 3, 4, 5, 6]
    for line in lines:
        assert line["skipped"] == 0
        assert line["compile_seconds"] == first["compile_seconds"]
        assert 0 < line["step_seconds_p50"] <= line["step_seconds_p90"] <= line["step_seconds_max"]
        assert line["tokens_per_second"] == pytest.approx(
            line["token_fill"] * 2 * 128 / line["step_seconds"], rel=1e-3
        )
        assert line["flops_per_second"] > 0
        assert 0 <= line["data_wait_fraction"] <= 1
        assert "mfu" not in line  # the peak of a CPU is unknown
    assert list((undisturbed / "profile").rglob("*.xplane.pb"))
    group, *table = (undisturbed / "parameters.txt").read_text().splitlines()
    assert re.fullmatch(
        r"others: \d+ tensors, [\d,]+ parameters, adamw, learning rate 0.003", group
    )
    assert len(table) > int(group.split()[1])


# -------------------------------------------------------------------------------------- dev scores


def test_dev_sets_are_scored_per_language(undisturbed, folder, tmp_path):
    """English and Korean utterances of one dev set are normalized by their own language's rules."""
    entries = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:4]]
    texts = {"en": ["Twenty-one colours!", "Mr. Park's"], "ko": ["Twenty-one 색!", "Mr. Park 안녕"]}
    answers = [{"text": text, "lang": lang} for lang in texts for text in texts[lang]]
    lines = [entry | answer for entry, answer in zip(entries, answers, strict=True)]
    manifest = folder / "dev.jsonl"
    manifest.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    config = tiny_experiment.get_config(str(folder))
    config.data.dev = str(manifest)
    dev = train.dev_sets(config.data)
    assert {label: len(members) for label, members in dev.items()} == {"asr-en": 2, "asr-ko": 2}
    config.data.dev_utterances = 1
    assert [len(members) for members in train.dev_sets(config.data).values()] == [1, 1]

    generator = load.load(config, Checkpoints(undisturbed, read_only=True), 6)
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    scores = train.evaluate(generator, dev, writer, step=6, batch_size=2)
    *written, scalars = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [list(line["texts"]) for line in written] == [["dev/asr-en"], ["dev/asr-ko"]]

    def score(lang: str, rules: str, metric: str) -> float:
        """The score of the answers in one language, normalized by the rules of another."""
        answers = predict.predictions(generator, dev[f"asr-{lang}"], batch_size=2)
        hypotheses = [answer["hypothesis"] for answer in answers]
        return round(metrics.asr(texts[lang], hypotheses, rules)[metric], 4)

    wer, cer = score("en", "en", "wer"), score("ko", "ko", "cer")
    assert cer != score("ko", "en", "cer")
    assert scores == {"wer": wer, "cer": cer}
    expected = {"dev/wer": wer, "dev/cer": cer, "dev/wer-en": wer, "dev/cer-ko": cer}
    assert scalars == {"step": 6, **expected}

    # A second language that is scored by WER too: the task's score is the mean.
    dev = {"asr-en": dev["asr-en"], "asr-de": dev["asr-en"]}
    scores = train.evaluate(generator, dev, writer, step=6, batch_size=2)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores == {"wer": (last["dev/wer-en"] + last["dev/wer-de"]) / 2}


def test_one_language_has_no_suffix(undisturbed, folder, tmp_path):
    config = tiny_experiment.get_config(str(folder))
    config.data.update({"dev": str(folder / "train.jsonl"), "dev_utterances": 2})
    generator = load.load(config, Checkpoints(undisturbed, read_only=True), 6)
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    scores = train.evaluate(generator, train.dev_sets(config.data), writer, 6, batch_size=2)
    texts, scalars = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert list(texts["texts"]) == ["dev/asr"]
    assert scalars == {"step": 6, "dev/wer": scores["wer"]}


def test_nothing_keeps_a_generator_after_its_scores(undisturbed, folder, tmp_path):
    """On a GPU, a generator has a copy of the decoder's weights."""
    config = tiny_experiment.get_config(str(folder))
    config.data.update({"dev": str(folder / "train.jsonl"), "dev_utterances": 2})
    generator = load.load(config, Checkpoints(undisturbed, read_only=True), 6)
    alive = weakref.ref(generator.params["llm"]["embed_tokens"])
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    gc.collect()
    gc.disable()
    try:
        train.evaluate(generator, train.dev_sets(config.data), writer, 6, batch_size=2)
        del generator
        assert alive() is None
    finally:
        gc.enable()


def test_the_best_step_is_saved_and_kept_and_starts_the_next_stage(
    run, folder, tmp_path, monkeypatch, caplog
):
    """Every scored step is saved, whatever config.checkpoint_every is."""
    wers = {2: 40.0, 4: 30.0, 6: 35.0}
    monkeypatch.setattr(train, "evaluate", lambda *args: {"wer": wers[args[3]]})
    dev = {"data.dev": str(folder / "train.jsonl"), "eval_every": 2}
    run(tmp_path / "first", dev | {"checkpoint_every": 100, "keep_checkpoints": 1})
    assert Checkpoints(tmp_path / "first", read_only=True).steps() == [4, 6]

    caplog.set_level("INFO", "absl")
    run(tmp_path / "second", {"init_from": str(tmp_path / "first"), "init_from_step": "best"})
    assert f"starting from {tmp_path}/first, step 4" in caplog.messages


# ------------------------------------------------------------------------ interruptions and damage


def test_sigterm_saves_and_the_run_resumes(run, undisturbed, tmp_path, monkeypatch, said):
    # Batches are prefetched: the fourth is drawn before the third step.
    on_batch(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert sorted(run(tmp_path)) == [1, 2, 3]
    assert "SIGTERM: saved step 3 and stopped; the same command resumes" in said
    assert (tmp_path / "checkpoints/3").is_dir()
    monkeypatch.undo()
    assert run(tmp_path) == tiny_experiment.losses(undisturbed)


def test_ctrl_c_saves_and_the_run_resumes(run, undisturbed, tmp_path, monkeypatch, capfd):
    former = signal.getsignal(signal.SIGINT)
    on_batch(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="saved step 3; the same command resumes"):
        run(tmp_path)
    assert "Ctrl-C: saving after this step; Ctrl-C again stops at once" in capfd.readouterr().err
    assert (tmp_path / "checkpoints/3").is_dir()  # the save is finished
    assert signal.getsignal(signal.SIGINT) == former
    monkeypatch.undo()
    assert run(tmp_path) == tiny_experiment.losses(undisturbed)


def test_batches_of_another_size_use_every_row_once(run, tmp_path, monkeypatch):
    """The position in the data is the number of rows used, not the step times the batch size."""
    used = {}  # {step: rows}
    step_before, get = 0, train.loader._BatchSource.__getitem__

    def watched(source, number):
        first = source.first + number * source.global_rows
        used[step_before + number + 1] = list(range(first, first + source.global_rows))
        return get(source, number)

    monkeypatch.setattr(train.loader._BatchSource, "__getitem__", watched)
    for steps, size in ((2, 4), (4, 8), (5, 4)):
        changes = {"steps": steps, "global_batch_size": size, "optimizer.schedule": "constant"}
        run(tmp_path, changes)
        step_before = steps
    # Prefetched batches that the run did not use were overwritten by those of the resume.
    assert [used[step] for step in range(1, 6)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        list(range(8, 16)),
        list(range(16, 24)),
        [24, 25, 26, 27],
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["rows"] for line in lines} == {1: 4, 2: 8, 3: 16, 4: 24, 5: 28}


def test_another_optimizer_is_an_error_that_names_it(run, at_step_4):
    with pytest.raises(UserError) as raised:
        run(at_step_4, {"optimizer.name": "muon"})
    assert str(raised.value).startswith(
        f"{at_step_4}/checkpoints: config.optimizer.name was 'adamw' before the resume and is now "
        "'muon'; use the former values, or a new --workdir ("
    )
    assert (at_step_4 / "checkpoints/4").is_dir()


def test_an_error_waits_for_the_save_that_is_running(run, undisturbed, tmp_path, monkeypatch):
    def fail():
        raise UserError("a clip is damaged")

    on_batch(monkeypatch, 4, fail)  # drawn after step 2, whose save is running
    with pytest.raises(UserError, match="a clip is damaged"):
        run(tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["2"]
    monkeypatch.undo()
    assert run(tmp_path) == tiny_experiment.losses(undisturbed)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_workdir_that_cannot_be_made_is_an_error(run, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--workdir={tmp_path}/{name}: cannot write files"):
        run(tmp_path / name)


def test_a_corrupt_checkpoint_is_skipped(run, undisturbed, at_step_4, said):
    largest = max(
        (at_step_4 / "checkpoints/4/params").rglob("*"),
        key=lambda file: file.stat().st_size * file.is_file(),
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert run(at_step_4) == tiny_experiment.losses(undisturbed)
    (line,) = (line for line in said if "is unreadable" in line)
    assert line.startswith(
        f"checkpoint {at_step_4}/checkpoints/4 is unreadable, trying the previous one: "
    )
    assert (at_step_4 / "checkpoints/4.torn").is_dir()


def test_a_full_disk_ends_the_run_and_loses_nothing(run, undisturbed, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():
        while not (tmp_path / "checkpoints/2").is_dir():  # saves are asynchronous
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))

    on_batch(monkeypatch, 4, fill_disk)
    try:
        with pytest.raises(UserError) as raised:
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(raised.value) == (
        f"{tmp_path}/checkpoints: could not write a checkpoint (File too large); the last usable "
        "step is 2; raise the limit (ulimit -f), and run the same command again"
    )
    monkeypatch.undo()
    assert run(tmp_path) == tiny_experiment.losses(undisturbed)


def test_a_resume_warns_about_changes(run, folder, at_step_4, tmp_path, said):
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    manifest = folder / "changed.jsonl"
    manifest.write_text("".join(lines[:-1]))
    run(at_step_4, {"data.train.noise.path": str(manifest), "data.prefetch": 3})
    assert "config.data.prefetch was 2 before the resume and is now 3" in said
    assert (
        "config.data.train.noise: the manifest has changed since the checkpoint was saved, so the "
        "rows from here on differ" in said
    )


def test_other_pretrained_weights_are_an_error(run, folder, at_step_4, tmp_path):
    shutil.copytree(folder / "llm", tmp_path / "llm")
    config = tmp_path / "llm/config.json"
    config.write_text(config.read_text().replace("4096", "8192"))
    with pytest.raises(
        UserError,
        match=r"checkpoints/4: trained on different llm weights \(\w+; config.base.llm has \w+\)",
    ):
        run(at_step_4, {"base.llm": str(tmp_path / "llm")})


def test_non_finite_steps_end_the_run(run, tmp_path, monkeypatch, said):
    batches = train.loader.batches

    def broken(*args, **options):
        for step, batch in enumerate(batches(*args, **options), start=1):
            yield (
                batch
                if step in (1, 3)
                else batch | {"lora_gate": np.full_like(batch["lora_gate"], np.nan)}
            )

    monkeypatch.setattr(train.loader, "batches", broken)
    with pytest.raises(UserError) as raised:
        run(tmp_path, {"max_skipped": 3})
    assert str(raised.value) == (
        "3 steps in a row (up to step 6) had a non-finite loss or gradients: check rows 6 to 11 of "
        "the data, or lower config.optimizer.learning_rate"
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 0, 1, 2]
    assert [line["skipped_total"] for line in lines] == [0, 1, 1, 2, 3]


# ------------------------------------------------------------------------------ errors at start-up

ERRORS = {
    "wrong device count": (
        {"mesh.fsdp": 3},
        "config.mesh {'data': -1, 'fsdp': 3, 'tensor': 1} does not fit 1 devices: the product of "
        "the sizes must be 1; the nearest mesh is {'data': 1, 'fsdp': 1, 'tensor': 1}",
    ),
    "indivisible batch": (
        {"accumulate": 4},
        "config.global_batch_size=2 is not divisible by data × fsdp × accumulate = 1 × 4",
    ),
    "unknown trainable pattern": (
        {"trainable": ((r"decoder/.*", True), (r".*", False))},
        "pattern 'decoder/.*' of config.trainable decides no parameter; remove or correct it",
    ),
    "row too small": (
        {"data.row.tokens": 16},
        "a row has 4, 16 and 48 (24 of 24 clips do not fit): raise config.data.row",
    ),
    "missing base": (
        {"base.llm": "/nowhere/llm"},
        "/nowhere/llm: no such folder; give a folder with config.json",
    ),
    "unknown attention": (
        {"model.attention": "flash"},
        "config.model.attention=flash is not one of auto, xla, splash",
    ),
    "unknown remat": (
        {"model.remat": "gates"},
        "config.model.remat=gates: unknown name 'gates'; choose none, full, dots, or a",
    ),
    "window groups": (
        {"model.window_batch": 3},
        "config.model.window_batch=3 does not divide the 4 windows of config.data.row",
    ),
    "profile": (
        {"profile": "4"},
        "config.profile='4': should be FIRST:LAST, two step numbers such as 5:8",
    ),
    "missing stage": (
        {"init_from": "/nowhere/stage1"},
        "/nowhere/stage1: no checkpoints; train there first",
    ),
    "step of the stage": (
        {"init_from_step": "newest"},
        "config.init_from_step='newest': should match pattern '^(best|[0-9]{1,9})?$'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_config_that_cannot_run_is_an_error(run, tmp_path, name, monkeypatch):
    changes, line = ERRORS[name]
    monkeypatch.setattr(train.loader, "batches", lambda *_, **__: pytest.fail("no error"))
    with pytest.raises(UserError) as raised:
        run(tmp_path, changes)
    assert line in str(raised.value)


def test_too_little_memory_is_an_error_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda devices=jax.local_devices()[:2]: devices)
    monkeypatch.setattr(memory, "capacity_of", lambda mesh: 1_200_000)
    monkeypatch.setattr(train.experiment, "init_params", lambda *_: pytest.fail("no error"))
    with pytest.raises(UserError) as raised:
        run(tmp_path)
    assert str(raised.value).startswith(
        "config.mesh {'data': 2, 'fsdp': 1, 'tensor': 1}: a train step needs at least 0.00 GiB"
    )
