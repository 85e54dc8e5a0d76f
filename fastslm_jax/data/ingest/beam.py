"""Runs an import as an Apache Beam pipeline (pip install fastslm-jax[beam]).

    python -m fastslm_jax.data.ingest jsonl:FILE --out=DIR --runner=DirectRunner
    python -m fastslm_jax.data.ingest jsonl:FILE --out=DIR --runner=DataflowRunner \
        --beam_option=--project=NAME --beam_option=--region=NAME

The pipeline maps `make_shard` over the shard numbers. Workers need this package, and must
mount the source and DIR at the same paths.
"""

from collections.abc import Iterable, Iterator, Sequence

from fastslm_jax.data.ingest.shards import ImportJob, make_shard
from fastslm_jax.errors import UserError


def run(
    job: ImportJob, numbers: Iterable[int], *, runner: str, options: Sequence[str] = ()
) -> Iterator[int]:
    """Writes shards in a pipeline.

    Yields:
        The shard numbers, when all shards are finished.

    Raises:
        UserError: Beam is not installed, or it rejects the runner or an option.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            f"--runner={runner}: needs Apache Beam; pip install fastslm-jax[beam]"
        ) from None
    numbers = list(numbers)
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(list(options)))
    except ValueError as error:
        raise UserError(f"--runner={runner}: {str(error).splitlines()[0]}") from None
    with pipeline:
        _ = (
            pipeline
            | "shard numbers" >> beam.Create(numbers)
            | "distribute" >> beam.Reshuffle()
            | "make shards" >> beam.Map(lambda number, job=job: make_shard(job, number))
        )
    yield from numbers
