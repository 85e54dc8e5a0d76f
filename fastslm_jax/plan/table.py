"""Prints plans as tables."""

from fastslm_jax.plan.compile import HBM_SHARE

RANKING = {  # column: width
    "fsdp": 5,
    "tensor": 6,
    "rows/chip": 9,
    "GiB": 7,
    "executed/minimum": 17,
    "bound by": 13,
    "MFU bound": 10,
    "audio h/day": 12,
}
NETWORKS = {"ici": "within a slice or node", "dcn": "between them"}


def print_table(plan: dict) -> None:
    """Prints one plan, the result of `compile.plan`."""

    def show(label: str, value: str) -> None:
        print(f"{label:<34} {value}")

    bounds = plan["bound_seconds"]
    show("topology", f"{plan['topology']} ({plan['chips']} chips)")
    show("mesh", " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()))
    show("rows per chip", f"{plan['rows_per_chip']:g}")
    show("memory per chip", "GiB")
    for kind, size in plan["hbm_gib"].items():
        show(f"  {kind}", f"{size:.2f}")
    peak = f"{plan['hbm_peak_gib']:.2f}"
    if bounds:
        verdict = "fits" if plan["fits"] else "does not fit"
        peak += f" of {plan['hbm_capacity_gib']:.0f}: {verdict} in {HBM_SHARE:.0%}"
    show("  peak", peak)
    ratio = plan["flops_executed"] / plan["flops_minimum"]
    show("FLOPs executed", f"{plan['flops_executed']:.4g}")
    show("  minimum", f"{plan['flops_minimum']:.4g} (ratio {ratio:.3f})")
    show("sent per chip, GiB", f"{plan['collective_gib']:.2f}")
    for kind, size in plan["collective_gib_by_kind"].items():
        if size:
            show(f"  {kind}", f"{size:.3f}")
    for network, label in NETWORKS.items():
        sent, seconds = plan["networks"][network].values()
        if sent:
            show(f"  {label}", f"{sent:.3f}" + (f", {seconds:.4f} s" if seconds else ""))
    sizes = f"largest layer {plan['largest_layer_gib']:.3f}, embedding {plan['embedding_gib']:.3f}"
    show("largest all-gather, GiB", f"{plan['largest_gather_gib']:.3f} ({sizes})")
    if bounds:
        for kind, seconds in bounds.items():
            mark = " ← bottleneck" if kind == plan["binds"] else ""
            show(f"{kind} bound, s", f"{seconds:.4f}{mark}")
        show("MFU bound", f"{plan['mfu_bound']:.1%}")
    else:
        show("bounds", "unknown: this device is not in fastslm_jax/chips.py")
    show("audio hours per step", f"{plan['audio_hours_per_step']:.2f}")
    if bounds:
        show("audio hours per day, bound", f"{plan['audio_hours_per_day']:,.0f}")
    show("trace + compile, s", f"{plan['trace_seconds']:.1f} + {plan['compile_seconds']:.1f}")


def print_traffic(plan: dict) -> None:
    """Prints the instructions that move the most bytes, and the line of code they come from."""
    print(f"{'GiB':>9} {'times':>6}  instruction (source)")
    for entry in plan["traffic"]:
        source = f" ({entry['source']})" if entry["source"] else ""
        print(f"{entry['gib']:>9.3f} {entry['runs']:>6}  {entry['name']}{source}")


def print_ranking(plans: list[dict]) -> None:
    """Prints one line per plan, in the order given."""
    rows = [tuple(RANKING), *map(_ranking_row, plans)]
    print()
    for row in rows:
        cells = zip(row, RANKING.values(), strict=True)
        print(" ".join(f"{cell:>{width}}" for cell, width in cells))


def _ranking_row(plan: dict) -> tuple[str, ...]:
    bounds = ("-", "-", "-")
    if plan["bound_seconds"]:
        bounds = (
            plan["binds"],
            f"{plan['mfu_bound']:.1%}",
            f"{plan['audio_hours_per_day']:,.0f}",
        )
    return (
        str(plan["mesh"]["fsdp"]),
        str(plan["mesh"]["tensor"]),
        f"{plan['rows_per_chip']:g}",
        f"{plan['hbm_peak_gib']:.2f}",
        f"{plan['flops_executed'] / plan['flops_minimum']:.3f}",
        *bounds,
    )
