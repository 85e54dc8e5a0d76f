"""Conversion of clips: token counts, and clips that are parts of a recording."""

import dataclasses

import numpy as np
import soundfile
from signals import SECOND, noise

from fastslm_jax.data.ingest import store
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.manifest import Segment, read_clip, read_manifest


def test_token_counts_match_the_tokenizer(
    noise_corpus, tokenizer_folder, prompt_tokenizer, tmp_path
):
    prompt_tokenizer = prompt_tokenizer
    import_corpus(noise_corpus, tmp_path / "out", Settings(tokenizer=str(tokenizer_folder)))
    utterances = read_manifest(tmp_path / "out")

    def length(*answers: str) -> int:
        return len(prompt_tokenizer.answer_ids(answers)) - 1  # without the end-of-turn token

    assert [u.text_tokens for u in utterances] == [length(u.answer) for u in utterances]
    after_another = [length("a", u.answer) - length("a") for u in utterances]
    assert [u.joined_tokens for u in utterances] == after_another
    assert store.description(tmp_path / "out")["tokenizer"] == prompt_tokenizer.fingerprint()


def test_parts_of_a_recording_keep_their_offset_and_segments(write_manifest, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(6.0), SECOND, subtype="PCM_16")
    segments = [
        {"start": 0.0, "end": 1.0, "text": "one"},
        {"start": 1.0, "end": 2.0, "text": "two"},
    ]
    part = {"audio_filepath": "a.wav", "offset": 3.5, "duration": 2.0, "text": "one two"}
    lines = [
        part | {"segments": segments},
        {"audio_filepath": "a.wav", "offset": 0.0, "duration": 1.5, "text": "zero"},
    ]
    import_corpus(write_manifest(tmp_path, lines), tmp_path / "out")
    late, early = read_manifest(tmp_path / "out")
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    np.testing.assert_array_equal(read_clip(late), whole[56_000:88_000])
    np.testing.assert_array_equal(read_clip(early), whole[:24_000])
    piece = dataclasses.replace(late, offset=4.0, seconds=0.5)
    np.testing.assert_array_equal(read_clip(piece), whole[64_000:72_000])
    assert (late.offset, late.recording, early.offset) == (3.5, "a.wav", 0.0)
    assert late.segments == (Segment(0.0, 1.0, "one"), Segment(1.0, 2.0, "two"))
