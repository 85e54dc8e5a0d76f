"""Command line of the importer; see `fastslm_jax.data.ingest.shards`."""

from fastslm_jax import cli
from fastslm_jax.data.ingest import shards

if __name__ == "__main__":
    shards.define_flags()
    cli.run(shards.main)
