"""What a corpus holds, in words and pictures."""

import numpy as np
import pytest

from fastslm_jax import inspect
from fastslm_jax.data import longform
from fastslm_jax.data import rows as pipeline
from fastslm_jax.data.ingest import shards as ingest
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.data.packing import RowShape


@pytest.fixture
def rows(corpus, encoder, model):
    join = longform.LongForm(4.0, 9.0, gap_seconds=(0.5, 0.5))
    sources = [
        pipeline.MixtureSource(str(corpus / "train.jsonl")),
        pipeline.MixtureSource(str(corpus / "train.jsonl"), ("asr",), 1.0, join),
    ]
    return pipeline.PackedRows(
        sources, RowShape(12, 640, 384), model.window, model.tokens_per_window, encoder, seed=0
    )


def test_one_screen_about_the_clips(corpus, tmp_path):
    spec = f"jsonl:{corpus}/train.jsonl"
    ingest.import_corpus(spec, tmp_path / "out")
    utterances = read_manifest(tmp_path / "out")
    lines = inspect.summary(tmp_path / "out", utterances)
    text = "\n".join(lines)
    assert (
        lines[0] == f"{tmp_path}/out: 11 clips, {sum(u.seconds for u in utterances) / 60:.1f} min"
    )
    assert all(f"{task} " in lines[1] for task in ("asr", "ast", "ssum", "sqqa"))
    assert f"recordings  {len({u.recording for u in utterances})}" in text
    assert "rejected    none" in text
    counts = [int(line.split(" s ")[1].split()[0]) for line in lines if " … " in line]
    assert len(counts) == 8
    assert sum(counts) == 11
    assert len(lines) < 24


def test_fill_is_counted_and_a_better_row_named(rows):
    lines, filled = inspect.fill(rows)
    _, packed = rows.plan(0)
    arrays = [rows[number] for number in range(len(packed))]
    windows = np.mean([(row["window_frames"] > 0).mean() for row in arrays])
    tokens = np.mean([(row["segment_ids"] > 0).mean() for row in arrays])
    assert f"filled      windows {windows:.1%}, tokens {tokens:.1%}" in lines[1]
    assert filled[:, 0].tolist() == [(row["window_frames"] > 0).sum() for row in arrays]
    assert "--config.data.row.tokens=" in lines[2]


def test_a_row_as_a_person_reads_it(rows):
    text = "\n".join(inspect.show_row(rows, 0))
    row = rows[0]
    examples = rows.examples(0)
    assert text.startswith(
        f"row 0: {len(examples)} examples; {(row['window_frames'] > 0).sum()} of 12 windows, "
    )
    for example in examples:
        assert rows.utterances(example)[0].id in text
        assert f"    answer  {rows.answer(example)}" in text
        for utterance in rows.utterances(example):
            assert utterance.text in text
    samples = inspect.row_audio(rows, 0)
    pauses = 8000 * (len(examples) - 1)
    assert len(samples) == sum(len(rows.samples(example)) for example in examples) + pauses


def test_a_picture(rows, corpus, tmp_path):
    utterances = read_manifest(corpus / "train.jsonl")
    inspect.draw(str(tmp_path / "a.png"), utterances, rows, inspect.fill(rows)[1])
    inspect.draw(str(tmp_path / "b.png"), utterances, None, None)
    widths = []
    for name in ("a.png", "b.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        widths.append(int.from_bytes(data[16:20], "big"))
    assert widths == [1540, 550]
