"""Command line of the planner; see `fastslm_jax.plan.compile`."""

from fastslm_jax import cli
from fastslm_jax.plan import compile as plan

if __name__ == "__main__":
    plan.define_flags()
    cli.run(plan.main)
