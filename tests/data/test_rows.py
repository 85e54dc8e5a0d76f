"""Packed rows: the row number alone determines a row's examples and arrays."""

import collections
import concurrent.futures
import json

import numpy as np
import pytest
import soundfile
from signals import noise

from fastslm_jax.audio import AudioError
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.data.packing import PackingError, RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows
from fastslm_jax.errors import UserError

# ---- The plan


def first_examples(rows: PackedRows, count: int):
    """The examples of rows 0, 1, …, until there are at least `count`."""
    examples, row = [], 0
    while len(examples) < count:
        examples += rows.examples(row)
        row += 1
    return examples


def test_an_epoch_contains_every_utterance_once(make_rows, corpus):
    size = len(read_manifest(corpus / "train.jsonl"))
    assert size == 11
    every_clip = [(clip,) for clip in range(size)]
    examples = first_examples(make_rows(), 2 * size)
    assert sorted(example.clips for example in examples[:size]) == every_clip
    assert sorted(example.clips for example in examples[size:]) == every_clip
    assert examples[size:] != examples[:size]


def test_the_plan_depends_on_the_seed_only(make_rows):
    examples = first_examples(make_rows(seed=5), 22)
    assert first_examples(make_rows(seed=5), 22) == examples
    assert first_examples(make_rows(seed=6), 22) != examples


def test_rows_can_be_read_in_any_order(make_rows):
    forward, backward = make_rows(), make_rows()
    expected = [forward.examples(row) for row in range(8)]
    assert [backward.examples(row) for row in reversed(range(8))] == expected[::-1]


def test_concurrent_threads_get_the_same_plan(make_rows):
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
def test_weights_are_relative_shares_of_an_epoch(make_rows, corpus, weights, shares):
    """With 6 clips of asr and 2 of sqqa, an epoch has 8 examples for any weights."""
    path = str(corpus / "train.jsonl")
    rows = make_rows(
        MixtureSource(path, ("asr",), weights[0]), MixtureSource(path, ("sqqa",), weights[1])
    )
    examples = first_examples(rows, 8)
    assert len(examples) == 8
    counts = collections.Counter(example.source for example in examples)
    assert counts == {0: shares[0], 1: shares[1]}


def test_a_source_continues_where_the_previous_epoch_stopped(make_rows, corpus):
    """At equal weights, an epoch has 4 of the 6 asr clips: three epochs are two passes."""
    path = str(corpus / "train.jsonl")
    rows = make_rows(MixtureSource(path, ("asr",)), MixtureSource(path, ("sqqa",)))
    clips = [example.clips[0] for example in first_examples(rows, 24) if example.source == 0]
    assert len(set(clips[:4])) == 4
    assert collections.Counter(clips) == dict.fromkeys(range(6), 2)


def test_plans_of_past_epochs_are_not_kept(make_rows):
    """Memory does not grow with the number of epochs; earlier rows can still be read."""
    rows = make_rows()
    expected = rows.examples(0)
    per_epoch = len(rows.plan(0)[1])
    assert len(rows.examples(20 * per_epoch)) > 0
    assert len(rows._plans) == 2
    assert rows.examples(0) == expected


# ---- Joined and split clips


def longest_example(rows: PackedRows):
    examples = [example for row in range(4) for example in rows.examples(row)]
    return max(examples, key=lambda example: len(example.clips))


@pytest.fixture
def joined_rows(make_rows, corpus):
    join = LongForm(6.0, 11.0, gap_seconds=(0.25, 0.25))
    return make_rows(MixtureSource(str(corpus / "train.jsonl"), ("asr",), join=join))


def test_joined_clips_are_separated_by_silence(joined_rows):
    example = longest_example(joined_rows)
    assert len(example.clips) >= 2
    utterances = joined_rows.utterances(example)
    assert joined_rows.answer(example) == " ".join(utterance.text for utterance in utterances)
    samples = joined_rows.samples(example)
    assert len(samples) == sum(u.num_samples for u in utterances) + 4_000 * (len(utterances) - 1)
    start = utterances[0].num_samples
    assert not samples[start : start + 4_000].any()
    second, _ = soundfile.read(utterances[1].path, dtype="int16")
    np.testing.assert_array_equal(samples[start + 4_000 :][: len(second)], second)


def test_segments_of_joined_clips_are_the_timed_transcript(joined_rows):
    example, start = longest_example(joined_rows), 0.0
    utterances, segments = joined_rows.utterances(example), joined_rows.segments(example)
    for utterance, segment in zip(utterances, segments, strict=True):
        assert segment.text == utterance.text
        expected = (start, start + utterance.seconds)
        assert (segment.start, segment.end) == pytest.approx(expected, abs=1e-4)
        start = segment.end + 0.25


def test_clips_of_different_tasks_are_not_joined(make_rows, corpus):
    source = MixtureSource(str(corpus / "train.jsonl"), ("asr", "ssum"), join=LongForm(6.0, 11.0))
    message = (
        "train.jsonl: clips of asr, ssum cannot be joined; name one of them in the source's tasks"
    )
    with pytest.raises(UserError, match=message):
        make_rows(source)


def test_a_recording_longer_than_a_row_is_split_at_its_segments(tmp_path, make_rows):
    soundfile.write(tmp_path / "a.wav", noise(5.0), 16_000, subtype="PCM_16")
    words = "one two three four five".split()
    segments = [{"start": float(i), "end": i + 1.0, "text": word} for i, word in enumerate(words)]
    line = {"audio_filepath": "a.wav", "duration": 5.0, "text": " ".join(words), "id": "tape"}
    manifest = tmp_path / "train.jsonl"
    manifest.write_text(json.dumps(line | {"segments": segments}) + "\n")
    shape = RowShape(windows=2, tokens=200, labels=100)
    rows = make_rows(MixtureSource(str(manifest)), shape=shape)
    examples = first_examples(rows, 3)
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert sorted(rows.answer(example) for example in examples) == ["five", "one two", "three four"]
    for example in examples:
        start = {"one two": 0, "three four": 32_000, "five": 64_000}[rows.answer(example)]
        np.testing.assert_array_equal(rows.samples(example), whole[start : start + 32_000])

    manifest.write_text(json.dumps(line) + "\n")
    with pytest.raises(PackingError, match=r"tape takes 5 windows, .*: raise config.data.row"):
        make_rows(MixtureSource(str(manifest)), shape=shape)


# ---- The arrays


def test_planned_sizes_match_the_arrays(make_rows, prompt_tokenizer):
    rows = make_rows()
    for number in range(3):
        row, examples = rows[number], rows.examples(number)
        windows, tokens, labels = rows.sizes(examples).sum(axis=0)
        assert (row["window_frames"] > 0).sum() == windows
        assert (row["segment_ids"] > 0).sum() == tokens
        assert row["loss_mask"].sum() == labels
        for segment, example in enumerate(examples, start=1):
            is_label = (row["segment_ids"] == segment) & (row["loss_mask"] == 1)
            assert prompt_tokenizer.decode(row["labels"][is_label]) == rows.answer(example)


@pytest.mark.parametrize("is_imported", [False, True])
def test_clips_without_speech_add_no_text(
    make_rows, prompt_tokenizer, tokenizer_folder, tmp_path, is_imported
):
    """Alone, their answer is the end-of-turn token; joined, they add their audio only."""
    texts, lines = ["", "one", "", "two three", ""], []
    for number, text in enumerate(texts):
        soundfile.write(tmp_path / f"{number}.wav", noise(1.0, number), 16_000)
        line = {"audio_filepath": f"{number}.wav", "duration": 1.0, "text": text}
        lines.append(line | {"no_speech": not text, "id": str(number), "recording": "tape"})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if is_imported:
        settings = Settings(tokenizer=str(tokenizer_folder))
        import_corpus(f"jsonl:{path}", tmp_path / "imported", settings)
        path = tmp_path / "imported"
    assert [u.no_speech for u in read_manifest(path)] == [not text for text in texts]

    single = make_rows(MixtureSource(str(path)))
    empty = next(example for example in first_examples(single, 5) if not single.answer(example))
    assert single.sizes([empty])[0, 2] == 1

    for grouping, answers in (
        ("recording", {"one two three"}),
        ("semantic", {"one two three", "two three one"}),
    ):
        join = LongForm(30.0, 30.0, grouping, gap_seconds=(0.0, 0.0))
        rows = make_rows(MixtureSource(str(path), ("asr",), join=join))
        (example,) = first_examples(rows, 1)
        assert len(rows.samples(example)) == 5 * 16_000
        assert rows.answer(example) in answers
        labels = rows[0]["labels"][rows[0]["loss_mask"] == 1]
        assert prompt_tokenizer.decode(labels) == rows.answer(example)
        assert len(labels) == rows.sizes([example])[0, 2]


def test_an_imported_folder_gives_the_same_rows_as_its_manifest(
    make_rows, corpus, tokenizer_folder, tmp_path
):
    settings = Settings(shard_clips=4, tokenizer=str(tokenizer_folder))
    import_corpus(f"jsonl:{corpus}/train.jsonl", tmp_path / "imported", settings)
    join = LongForm(3.0, 8.0, "semantic")

    def rows_of(path):
        return make_rows(MixtureSource(str(path)), MixtureSource(str(path), ("asr",), join=join))

    from_files, imported = rows_of(corpus / "train.jsonl"), rows_of(tmp_path / "imported")
    assert all(utterance.text_tokens is not None for utterance in imported.indices[0])
    for number in range(4):
        expected, actual = from_files[number], imported[number]
        assert set(actual) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_context_is_a_part_of_the_prompt_and_not_a_target(tmp_path, make_rows, prompt_tokenizer):
    """Names of control tokens in it are text; an import keeps it; other lines are as before."""
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16_000, subtype="PCM_16")
    line = {"audio_filepath": "a.wav", "duration": 1.0, "text": "hello", "id": "1"}
    arrays = {}
    for name, change in (
        ("plain", {}),
        ("context", {"context": ["Zsófia", "<|im_end|><|AUDIO|>"]}),
        ("prompt", {"prompt": "Transcribe the audio clip into text.\nContext: Zsófia, x"}),
    ):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text(json.dumps(line | change) + "\n")
        arrays[name] = make_rows(MixtureSource(str(manifest)))[0]
        import_corpus(f"jsonl:{manifest}", tmp_path / name, Settings())
        imported = make_rows(MixtureSource(str(tmp_path / name)))[0]
        for array in imported:
            np.testing.assert_array_equal(imported[array], arrays[name][array])

    def text(name, chosen):
        row = arrays[name]
        return prompt_tokenizer.tokenizer.decode(row["tokens"][chosen(row)].tolist())

    prompts = {
        name: text(name, lambda row: (row["segment_ids"] > 0) & (row["speech_slot"] < 0))
        for name in arrays
    }
    assert "text.\nContext: Zsófia, <|im_end|><|AUDIO|><|im_end|>\n" in prompts["context"]
    assert "text.\nContext: Zsófia, x<|im_end|>\n" in prompts["prompt"]
    assert "text.<|im_end|>\n" in prompts["plain"]
    for row in arrays.values():
        is_label = row["loss_mask"] == 1
        labels = row["labels"][is_label].tolist()
        assert labels == [*prompt_tokenizer.answer_ids("hello")]
        tokens = row["tokens"].tolist()  # <|im_end|> ends the two turns; <|AUDIO|> is gone
        assert tokens.count(prompt_tokenizer.end_id) == 2
        assert prompt_tokenizer.audio_id not in tokens


def test_a_clip_that_does_not_fit_is_named(make_rows):
    message = (
        r"train-\w+-00000\d takes \d+ windows, \d+ tokens and \d+ labels; a row has 2, 640 and 384 "
        r"\(\d+ of 11 clips do not fit\): raise config.data.row"
    )
    with pytest.raises(PackingError, match=message):
        make_rows(shape=RowShape(2, 640, 384))


def test_a_manifest_with_a_wrong_duration_is_named(tmp_path, make_rows):
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16_000)
    line = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    rows = make_rows(MixtureSource(str(tmp_path / "train.jsonl")))
    message = r"a.wav: the file is 1.00 s long, the manifest says 1.50 s"
    with pytest.raises(AudioError, match=message):
        rows[0]
