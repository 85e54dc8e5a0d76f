"""The import as an Apache Beam pipeline, for corpora that one machine is too slow for (pip install fastslm-jax[beam]).

    python -m fastslm_jax.data.ingest jsonl:… --out=DIR --runner=DirectRunner
    python -m fastslm_jax.data.ingest jsonl:… --out=DIR --runner=DataflowRunner --beam_option=--project=… --beam_option=--region=…

The pipeline's elements are shard numbers, its transform is the one of the other way (`ingest.make_shard`). Workers need this
package, the source and DIR under the same paths: a file system that all of them mount.
"""

from collections.abc import Iterable, Iterator, Sequence

from fastslm_jax.data.ingest import shards as ingest
from fastslm_jax.errors import UserError


def run(
    job: "ingest.ImportJob", numbers: Iterable[int], *, runner: str, options: Sequence[str] = ()
) -> Iterator[int]:
    """Makes shards in a pipeline; yields their numbers when all are done.

    Raises:
        UserError: Beam is not installed, or does not know the runner or an option.
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
            | "one worker each" >> beam.Reshuffle()
            | "make" >> beam.Map(lambda number, job=job: ingest.make_shard(job, number))
        )
    yield from numbers
