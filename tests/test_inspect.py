"""The inspect command: descriptions of clips and rows, and the plot."""

import numpy as np
import pytest

from fastslm_jax import inspect
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows


@pytest.fixture
def rows(corpus, prompt_tokenizer, model):
    prompt_tokenizer, path = prompt_tokenizer, str(corpus / "train.jsonl")
    join = LongForm(4.0, 9.0, gap_seconds=(0.5, 0.5))
    sources = [MixtureSource(path), MixtureSource(path, ("asr",), 1.0, join)]
    shape = RowShape(windows=12, tokens=640, labels=384)
    return PackedRows(
        sources, shape, model.window, model.tokens_per_window, prompt_tokenizer, seed=0
    )


def test_summary_of_an_imported_folder(corpus, tmp_path):
    out = tmp_path / "out"
    import_corpus(f"jsonl:{corpus}/train.jsonl", out)
    utterances = read_manifest(out)
    lines = inspect.summary(out, utterances)
    text = "\n".join(lines)
    assert lines[0] == f"{out}: 11 clips, {sum(u.seconds for u in utterances) / 60:.1f} min"
    assert all(f"{task} " in lines[1] for task in ("asr", "ast", "ssum", "sqqa"))
    assert f"recordings  {len({u.recording for u in utterances})}" in text
    assert "rejected    none" in text
    counts = [int(line.split(" s ")[1].split()[0]) for line in lines if " … " in line]
    assert len(counts) == 8
    assert sum(counts) == 11
    assert len(lines) < 24


def test_row_usage_is_counted_and_a_better_shape_suggested(rows):
    lines, filled = inspect.row_usage(rows)
    _, packed = rows.plan(0)
    arrays = [rows[number] for number in range(len(packed))]
    windows = np.mean([(row["window_frames"] > 0).mean() for row in arrays])
    tokens = np.mean([(row["segment_ids"] > 0).mean() for row in arrays])
    assert f"filled      windows {windows:.1%}, tokens {tokens:.1%}" in lines[1]
    assert filled[:, 0].tolist() == [(row["window_frames"] > 0).sum() for row in arrays]
    assert "--config.data.row.tokens=" in lines[2]


def test_description_and_audio_of_a_row(rows):
    text = "\n".join(inspect.describe_row(rows, 0))
    examples, windows = rows.examples(0), (rows[0]["window_frames"] > 0).sum()
    assert text.startswith(f"row 0: {len(examples)} examples; {windows} of 12 windows, ")
    for example in examples:
        assert rows.utterances(example)[0].id in text
        assert f"    answer  {rows.answer(example)}" in text
        for utterance in rows.utterances(example):
            assert utterance.text in text
    samples = inspect.row_audio(rows, 0)
    pauses = 8000 * (len(examples) - 1)
    assert len(samples) == sum(len(rows.samples(example)) for example in examples) + pauses


def test_plots_with_and_without_rows(rows, corpus, tmp_path):
    utterances = read_manifest(corpus / "train.jsonl")
    inspect.plot(str(tmp_path / "a.png"), utterances, rows, inspect.row_usage(rows)[1])
    inspect.plot(str(tmp_path / "b.png"), utterances, None, None)
    widths = []
    for name in ("a.png", "b.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        widths.append(int.from_bytes(data[16:20], "big"))
    assert widths == [1540, 550]
