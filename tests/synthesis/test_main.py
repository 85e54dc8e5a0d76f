"""The command, from sentences to manifests that share nothing with a test set."""

import os
import pathlib
import subprocess
import sys

import pytest

from fastslm_jax.data import contamination
from fastslm_jax.data.manifest import read_manifest

pytest.importorskip("espeakng_loader")

ROOT = pathlib.Path(__file__).parents[2]


def test_the_command_leaves_out_excluded_sentences_and_prints_a_summary(tmp_path):
    (tmp_path / "a.txt").write_text("one two three\nfour five six seven\nseven eight nine ten\n")
    (tmp_path / "test.txt").write_text("five six seven eight\nSeven, eight, nine, ten!\n")
    command = [
        *(sys.executable, "-m", "fastslm_jax.synthesis", "--workers=1", "--dev=0", "--count=4"),
        *("--sentences=a.txt", "--exclude=test.txt", "--out=out", "--no_speech=0"),
        "--engines=espeak:en-us+f3",
    ]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)
    assert done.stdout.splitlines() == [
        "2 sentences; left out: 1 equal to an excluded text",
        f"out: 4 clips, {done.stdout.split('clips, ')[1].split(' h')[0]} h, 2 sentences, 14 words, "
        "vocabulary 7, 0 without speech; espeak 4; train 4, dev 0; left out 0",
    ]
    texts = [utterance.text for utterance in read_manifest(tmp_path / "out/train.jsonl")]
    assert sorted(texts) == ["four five six seven"] * 2 + ["one two three"] * 2
    found = contamination.report(str(tmp_path / "out/train.jsonl"), str(tmp_path / "test.txt"))
    assert [line.partition(" of TEST")[0] for line in found] == ["sentences: 0", "4-grams: 0"]
