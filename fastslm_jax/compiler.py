"""Options of XLA's GPU compiler, each with its reason.

Sources: https://docs.jax.dev/en/latest/gpu_performance_tips.html and
https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance. Set others with the
environment variable XLA_FLAGS.
"""

import jax

# Of a train step on several GPUs.
SEVERAL_GPUS = {
    # Start collectives as early and await them as late as the memory allows, so that they run
    # while matrix products do. The default order awaits each of them at once.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
# Of a compilation without a GPU (the planner).
NO_GPU = {
    # Tile sizes of Triton's matrix products are found by running them. Without a GPU they are not
    # tuned, and one product of this model has no valid default. cuBLAS needs no tiles.
    "xla_gpu_enable_triton_gemm": False,
}


def train_options(devices: list[jax.Device]) -> dict[str, bool]:
    """Compiler options of a train step: `jax.jit(compiler_options=...)`."""
    return dict(SEVERAL_GPUS) if devices[0].platform == "gpu" and len(devices) > 1 else {}
