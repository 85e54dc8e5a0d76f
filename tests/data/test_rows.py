"""The feed: one integer is the position in the data, on any number of processes and workers."""

import collections
import concurrent.futures
import itertools
import json

import numpy as np
import pytest
import soundfile
from absl import flags

from fastslm_jax.audio import AudioError
from fastslm_jax.data import longform
from fastslm_jax.data import rows as pipeline
from fastslm_jax.data.ingest import shards as ingest
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.data.packing import PackingError, RowShape
from fastslm_jax.data.rows import MixtureSource
from fastslm_jax.errors import UserError

SHAPE = RowShape(windows=12, tokens=640, labels=384)


@pytest.fixture
def make_rows(corpus, encoder, model):
    def make(
        *sources: MixtureSource, shape: RowShape = SHAPE, seed: int = 0
    ) -> pipeline.PackedRows:
        sources = sources or (MixtureSource(str(corpus / "train.jsonl")),)
        return pipeline.PackedRows(
            sources, shape, model.window, model.tokens_per_window, encoder, seed
        )

    return make


def take(count, batches):
    return list(itertools.islice(batches, count))


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


# ------------------------------------------------------------------------------------------------------------------- plan


def examples_of(rows: pipeline.PackedRows, count: int):
    """Examples of the rows from 0 on, until there are `count`, and the number of those rows."""
    examples, row = [], 0
    while len(examples) < count:
        examples += rows.examples(row)
        row += 1
    return examples, row


def test_an_epoch_holds_every_utterance_once(make_rows, corpus):
    rows, size = make_rows(), len(read_manifest(corpus / "train.jsonl"))
    assert size == 11
    first, _ = examples_of(rows, size)
    assert sorted(example.clips for example in first) == [(clip,) for clip in range(size)]
    both, _ = examples_of(rows, 2 * size)
    assert sorted(example.clips for example in both[size:]) == [(clip,) for clip in range(size)]
    assert both[size:] != first


def test_the_plan_is_a_function_of_the_seed(make_rows):
    assert examples_of(make_rows(seed=5), 22) == examples_of(make_rows(seed=5), 22)
    assert examples_of(make_rows(seed=5), 22)[0] != examples_of(make_rows(seed=6), 22)[0]


def test_rows_can_be_asked_for_in_any_order(make_rows):
    forth, back = make_rows(), make_rows()
    expected = [forth.examples(row) for row in range(8)]
    assert [back.examples(row) for row in reversed(range(8))] == expected[::-1]


def test_threads_that_plan_at_once_agree(make_rows):
    alone = make_rows()
    expected = [alone.examples(row) for row in range(16)]
    for _ in range(20):
        rows = make_rows()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(rows.examples, range(16))) == expected


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((3.0, 1.0), (6, 2)), ((0.75, 0.25), (6, 2)), ((1.0, 1.0), (4, 4)), ((7.0, 1.0), (7, 1))],
)
def test_weights_are_shares_of_an_epoch(make_rows, corpus, weights, shares):
    """6 clips of asr and 2 of sqqa: 8 examples an epoch, whatever the weights."""
    path = str(corpus / "train.jsonl")
    rows = make_rows(
        MixtureSource(path, ("asr",), weights[0]), MixtureSource(path, ("sqqa",), weights[1])
    )
    examples, _ = examples_of(rows, 8)
    assert len(examples) == 8
    assert collections.Counter(example.source for example in examples) == {
        0: shares[0],
        1: shares[1],
    }


def test_a_source_goes_on_where_the_epoch_before_stopped(make_rows, corpus):
    """At equal weights an epoch has 4 of the 6 asr clips: three epochs are two passes over them."""
    path = str(corpus / "train.jsonl")
    examples, _ = examples_of(
        make_rows(MixtureSource(path, ("asr",)), MixtureSource(path, ("sqqa",))), 24
    )
    clips = [example.clips[0] for example in examples if example.source == 0]
    assert len(set(clips[:4])) == 4
    assert collections.Counter(clips) == dict.fromkeys(range(6), 2)


def test_joined_sources_make_long_examples(make_rows, corpus):
    join = longform.LongForm(6.0, 11.0, gap_seconds=(0.25, 0.25))
    rows = make_rows(MixtureSource(str(corpus / "train.jsonl"), ("asr",), join=join))
    examples = {example for row in range(4) for example in rows.examples(row)}
    example = max(examples, key=lambda example: len(example.clips))
    assert len(example.clips) >= 2
    utterances = rows.utterances(example)
    assert rows.answer(example) == " ".join(utterance.text for utterance in utterances)
    samples = rows.samples(example)
    assert len(samples) == sum(u.num_samples for u in utterances) + 4_000 * (len(utterances) - 1)
    start = utterances[0].num_samples
    assert not samples[start : start + 4_000].any()
    second, _ = soundfile.read(utterances[1].path, dtype="int16")
    np.testing.assert_array_equal(samples[start + 4_000 :][: len(second)], second)


def test_clips_of_different_tasks_are_not_joined(make_rows, corpus):
    with pytest.raises(
        UserError,
        match=r"train.jsonl: clips of asr, ssum cannot be joined; name one of them in the source's tasks",
    ):
        make_rows(
            MixtureSource(
                str(corpus / "train.jsonl"), ("asr", "ssum"), join=longform.LongForm(6.0, 11.0)
            )
        )


def test_plans_of_far_epochs_are_not_kept(make_rows):
    """Memory does not grow with the epochs, and a row that lies back is the same as before."""
    rows = make_rows()
    expected = rows.examples(0)
    per_epoch = len(rows.plan(0)[1])
    assert len(rows.examples(20 * per_epoch)) > 0
    assert len(rows._epochs) == 2
    assert rows.examples(0) == expected


def test_a_recording_longer_than_a_row_is_split_at_its_segments(tmp_path, make_rows):
    soundfile.write(
        tmp_path / "a.wav",
        np.random.default_rng(0).normal(0, 0.1, 5 * 16_000),
        16_000,
        subtype="PCM_16",
    )
    segments = [
        {"start": float(i), "end": i + 1.0, "text": word}
        for i, word in enumerate("one two three four five".split())
    ]
    line = {
        "audio_filepath": "a.wav",
        "duration": 5.0,
        "text": "one two three four five",
        "id": "tape",
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(line | {"segments": segments}) + "\n")
    rows = make_rows(MixtureSource(str(tmp_path / "train.jsonl")), shape=RowShape(2, 200, 100))
    examples, _ = examples_of(rows, 3)
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert sorted(rows.answer(example) for example in examples) == ["five", "one two", "three four"]
    for example in examples:
        start = {"one two": 0, "three four": 32_000, "five": 64_000}[rows.answer(example)]
        np.testing.assert_array_equal(rows.samples(example), whole[start : start + 32_000])
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(PackingError, match=r"tape takes 5 windows, .*: raise config.data.row"):
        make_rows(
            MixtureSource(str(tmp_path / "train.jsonl")), shape=RowShape(2, 200, 100)
        ).examples(0)


def test_segments_say_what_is_said_when(make_rows, corpus):
    join = longform.LongForm(6.0, 11.0, gap_seconds=(0.25, 0.25))
    rows = make_rows(MixtureSource(str(corpus / "train.jsonl"), ("asr",), join=join))
    example = max((e for row in range(4) for e in rows.examples(row)), key=lambda e: len(e.clips))
    at = 0.0
    for utterance, segment in zip(rows.utterances(example), rows.segments(example), strict=True):
        assert segment.text == utterance.text
        assert (segment.start, segment.end) == pytest.approx((at, at + utterance.seconds), abs=1e-4)
        at = segment.end + 0.25


def test_an_imported_folder_gives_the_rows_of_its_manifest(
    make_rows, corpus, tokenizer_folder, tmp_path
):
    settings = ingest.Settings(shard_clips=4, tokenizer=str(tokenizer_folder))
    ingest.import_corpus(f"jsonl:{corpus}/train.jsonl", tmp_path / "imported", settings)
    join = longform.LongForm(3.0, 8.0, "semantic")

    def rows_of(path):
        return make_rows(MixtureSource(str(path)), MixtureSource(str(path), ("asr",), join=join))

    from_files, imported = rows_of(corpus / "train.jsonl"), rows_of(tmp_path / "imported")
    assert all(utterance.text_tokens is not None for utterance in imported.indices[0])
    for number in range(4):
        assert_same(imported[number], from_files[number])


# ------------------------------------------------------------------------------------------------------------------- rows


def test_the_planned_size_is_what_a_row_holds(make_rows, encoder):
    rows = make_rows()
    for number in range(3):
        row, examples = rows[number], rows.examples(number)
        windows, tokens, labels = rows.sizes(examples).sum(axis=0)
        assert (row["window_frames"] > 0).sum() == windows
        assert (row["segment_ids"] > 0).sum() == tokens
        assert row["loss_mask"].sum() == labels
        for segment, example in enumerate(examples, start=1):
            is_label = (row["segment_ids"] == segment) & (row["loss_mask"] == 1)
            assert encoder.decode(row["labels"][is_label]) == rows.answer(example)


def test_a_row_that_is_too_small_is_named(make_rows):
    message = (
        r"train-\w+-00000\d takes \d+ windows, \d+ tokens and \d+ labels; a row has 2, 640 and 384 "
        r"\(\d+ of 11 clips fit no row\): raise config.data.row"
    )
    with pytest.raises(PackingError, match=message):
        make_rows(shape=RowShape(2, 640, 384))  # before any row is asked for


def test_a_manifest_that_disagrees_with_its_audio_is_named(tmp_path, make_rows):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    line = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    rows = make_rows(MixtureSource(str(tmp_path / "train.jsonl")))
    with pytest.raises(AudioError, match=r"a.wav: holds 1.00 s, its manifest says 1.50 s"):
        rows[0]


# ---------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_rows_in_their_order(make_rows):
    rows = make_rows()
    first, second = take(2, pipeline.batches(rows, 2))
    for batch, numbers in ((first, (0, 1)), (second, (2, 3))):
        for place, number in enumerate(numbers):
            assert_same({name: value[place] for name, value in batch.items()}, rows[number])


def test_two_processes_see_the_halves_of_each_batch(make_rows):
    whole = take(2, pipeline.batches(make_rows(), 4))
    parts = [
        take(2, pipeline.batches(make_rows(), 4, process_index=index, process_count=2))
        for index in range(2)
    ]
    for step in range(2):
        joined = {
            name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]
        }
        assert_same(joined, whole[step])


def test_a_resumed_feed_goes_on_at_its_row(make_rows):
    whole = take(4, pipeline.batches(make_rows(), 2))
    for batch, expected in zip(
        take(2, pipeline.batches(make_rows(), 2, start_row=4)), whole[2:], strict=True
    ):
        assert_same(batch, expected)


def test_worker_processes_give_the_same_batches(make_rows):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    from_threads = take(3, pipeline.batches(make_rows(), 2, workers=0))
    from_workers = take(3, pipeline.batches(make_rows(), 2, workers=4, prefetch=1))
    for batch, expected in zip(from_workers, from_threads, strict=True):
        assert_same(batch, expected)


def test_positions_that_do_not_divide_are_refused(make_rows):
    with pytest.raises(
        ValueError, match="4 rows a batch from row 6 do not divide over 1 processes"
    ):
        pipeline.batches(make_rows(), 4, start_row=6)
    with pytest.raises(
        ValueError, match="3 rows a batch from row 0 do not divide over 2 processes"
    ):
        pipeline.batches(make_rows(), 3, process_count=2)


def test_batches_are_put_on_the_devices_one_early():
    put = []
    pairs = pipeline.ahead(iter("abc"), lambda batch: put.append(batch) or batch.upper())
    assert next(pairs) == ("a", "A")
    assert put == ["a", "b"]
    assert list(pairs) == [("b", "B"), ("c", "C")]
