"""Imports a corpus: decodes, resamples and checks its audio, and writes shards with an index.

    python -m fastslm_jax.data.ingest SOURCE --out=DIR [--tokenizer=assets/demo_llm] [--workers=8]

SOURCE is jsonl:FILE, librispeech:FOLDER, tfds:NAME/CONFIG[:SPLIT] or hf:NAME/CONFIG[:SPLIT]; see
docs/data.md. Running the same command again resumes an interrupted import.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

from absl import flags

from fastslm_jax import cli
from fastslm_jax.data.ingest import beam
from fastslm_jax.data.ingest.importing import import_corpus, run_processes, summary
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.ingest.sources import SOURCES
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    default = Settings()
    flags.DEFINE_string("out", None, "Output folder.", required=True)
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes.", lower_bound=1)
    flags.DEFINE_float(
        "max_reject_fraction",
        0.01,
        "Fail the import if a larger fraction of the entries is rejected.",
        0.0,
        1.0,
    )
    flags.DEFINE_string(
        "tokenizer",
        default.tokenizer,
        "Folder or name of the language model whose tokenizer counts the answers' tokens; without "
        "it, they are counted when training starts.",
    )
    flags.DEFINE_float(
        "window_seconds",
        default.window_seconds,
        "Length of the encoder's window in seconds.",
        lower_bound=1.0,
    )
    flags.DEFINE_integer(
        "shard_clips", default.shard_clips, "Entries of the source per shard.", lower_bound=1
    )
    flags.DEFINE_float(
        "duration_tolerance",
        default.duration_tolerance,
        "Seconds by which an audio file may differ from its duration.",
        lower_bound=0.0,
    )
    flags.DEFINE_float(
        "min_chars_per_second",
        default.min_chars_per_second,
        "Reject clips with fewer characters of text per second.",
    )
    flags.DEFINE_float(
        "max_chars_per_second",
        default.max_chars_per_second,
        "Reject clips with more characters of text per second.",
    )
    flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets (default: that of TFDS).")
    flags.DEFINE_string(
        "lang",
        "",
        "Language code of a tfds: or hf: dataset (en, ko, …); by default, the row's own field, or "
        "en.",
    )
    flags.DEFINE_string(
        "runner",
        "",
        "Run as an Apache Beam pipeline: DirectRunner, DataflowRunner, FlinkRunner or SparkRunner.",
    )
    flags.DEFINE_multi_string(
        "beam_option",
        [],
        "An option of the Beam pipeline, for example --beam_option=--region=europe-west4.",
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    if len(argv) != 2:
        raise UserError(f"exactly one SOURCE is required: {SOURCES}")
    settings = Settings(
        **{field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    )
    if FLAGS.runner:
        run = functools.partial(beam.run, runner=FLAGS.runner, options=FLAGS.beam_option)
    else:
        run = functools.partial(run_processes, workers=FLAGS.workers)
    dataset = import_corpus(
        argv[1],
        FLAGS.out,
        settings,
        max_reject_fraction=FLAGS.max_reject_fraction,
        run=run,
        data_dir=FLAGS.data_dir,
        lang=FLAGS.lang,
    )
    print(summary(FLAGS.out, dataset))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
