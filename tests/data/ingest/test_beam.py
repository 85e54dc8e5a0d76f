"""An import as an Apache Beam pipeline."""

import functools

import pytest

from fastslm_jax.data.ingest import beam
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings


def test_a_pipeline_writes_the_same_bytes(noise_corpus, imported, file_contents, tmp_path):
    pytest.importorskip("apache_beam")
    run = functools.partial(beam.run, runner="DirectRunner")
    import_corpus(noise_corpus, tmp_path / "beam", Settings(shard_clips=5), run=run)
    assert file_contents(tmp_path / "beam") == file_contents(imported)
