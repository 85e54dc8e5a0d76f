"""Searches mesh shapes and batch sizes for the fastest step that fits in memory."""

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from fastslm_jax import memory
from fastslm_jax.chips import Chip
from fastslm_jax.errors import UserError
from fastslm_jax.plan import table
from fastslm_jax.plan.compile import memory_advice, plan, set_rows

RANKED_FIELDS = ("mesh", "rows_per_chip", "hbm_peak_gib", "mfu_bound", "audio_hours_per_day")


def sweep(
    config: ConfigDict,
    devices: list[jax.Device],
    chip: Chip | None,
    name: str,
    rows: Sequence[int],
    fsdp: Sequence[int] = (),
    tensor: Sequence[int] = (1,),
) -> dict:
    """Plans all combinations of mesh axes and rows per chip, and ranks those that fit.

    Args:
        config, devices, chip, name: see `compile.plan`; config.mesh and config.global_batch_size
            are overwritten.
        rows: rows per chip, in increasing order.
        fsdp: sizes of the fsdp axis; by default, powers of two that divide the devices.
        tensor: sizes of the tensor axis.

    Returns:
        The plan with the most audio hours per day, and in "ranked" a summary of all that fit.

    Raises:
        memory.CapacityError: nothing fits.
    """
    meshes = [
        (fsdp_size, tensor_size)
        for tensor_size in tensor
        for fsdp_size in fsdp or _powers_of_two(len(devices) // tensor_size)
    ]
    plans = []
    for fsdp_size, tensor_size in meshes:
        for rows_per_chip in rows:
            config.mesh.update({"data": -1, "fsdp": fsdp_size, "tensor": tensor_size})
            set_rows(config, devices, chip, rows_per_chip)
            label = f"fsdp {fsdp_size}, tensor {tensor_size}, {rows_per_chip} rows per chip"
            try:
                result = plan(config, devices, chip, name)
            except UserError as error:
                print(f"{label}: {error}", flush=True)
                if isinstance(error, memory.CapacityError):
                    break  # more rows need more memory
                continue
            plans.append(result)
            verdict = "fits" if result["fits"] else "does not fit" if chip else "compiles"
            print(f"{label}: {verdict}, {result['hbm_peak_gib']:.2f} GiB", flush=True)
    fitting = [result for result in plans if result["fits"] is not False]
    if not fitting:
        tried = ", ".join(f"{fsdp_size} × {tensor_size}" for fsdp_size, tensor_size in meshes)
        raise memory.CapacityError(
            f"{name}: no fsdp × tensor of {tried} fits with {', '.join(map(str, rows))} rows per "
            f"chip; {memory_advice(config)}"
        )
    fitting.sort(key=lambda result: -(result["audio_hours_per_day"] or 0))
    table.print_ranking(fitting)
    ranked = [{field: result[field] for field in RANKED_FIELDS} for result in fitting]
    return {**fitting[0], "ranked": ranked}


def _powers_of_two(number: int) -> list[int]:
    """Powers of two that divide the number. Example: 24 → [1, 2, 4, 8]."""
    return [2**power for power in range(number.bit_length()) if number % 2**power == 0]
