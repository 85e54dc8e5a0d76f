"""Facts of the accelerators that a plan can be made for, and the names of TPU topologies.

Sources: https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x (key specifications per chip; DCN of v5e: two NICs of
100 Gb/s for eight chips); NVIDIA's data sheets of A100, H100 SXM and H200 SXM (dense bfloat16). Interconnect figures there are
the sum of both directions over all ports; here they are halved: what a chip can send.
"""

import dataclasses
import math
import os
import re

import jax

from fastslm_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip: memory in bytes, bfloat16 FLOP/s, bytes/s of its memory, and bytes/s that it can send over the links of its
    slice (ICI, NVLink; all ports) and over the data-centre network. torus: axes of the links' torus, 0 for a switch.
    """

    name: str
    device_kinds: tuple[str, ...]  # as JAX calls its devices
    hbm_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    torus: int
    devices: int = 1  # JAX devices of a chip
    wraps_from: int = 0  # a torus axis of a slice closes to a ring if it is a multiple of this


CHIPS = (
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        16 * GIB,
        197e12,
        819e9,
        200e9,
        3.125e9,
        torus=2,
        wraps_from=16,
    ),
    Chip(
        "v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2765e9, 600e9, 6.25e9, torus=3, wraps_from=4
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        32 * GIB,
        918e12,
        1638e9,
        400e9,
        12.5e9,
        torus=2,
        wraps_from=16,
    ),
    Chip(
        "tpu7x",
        ("TPU7x",),
        192 * GIB,
        2307e12,
        7380e9,
        600e9,
        12.5e9,
        torus=3,
        devices=2,
        wraps_from=4,
    ),
    Chip("A100-40GB", ("NVIDIA A100-SXM4-40GB",), 40 * GIB, 312e12, 1555e9, 300e9, 25e9, torus=0),
    Chip("A100-80GB", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 312e12, 2039e9, 300e9, 25e9, torus=0),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 989e12, 3350e9, 450e9, 50e9, torus=0),
    Chip("H200", ("NVIDIA H200",), 141e9, 989e12, 4800e9, 450e9, 50e9, torus=0),
)
FLAT_SHAPES = (
    (1, 1),
    (2, 2),
    (2, 4),
    (4, 4),
    (4, 8),
    (8, 8),
    (8, 16),
    (16, 16),
)  # slices of v5e and v6e


def of_device(device: jax.Device) -> Chip | None:
    """The chip that a device is part of; None if its facts are not known (a CPU)."""
    return next((chip for chip in CHIPS if device.device_kind in chip.device_kinds), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or several of them joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[jax.Device]:
        """Devices to compile for; nothing can run on them. Needs libtpu.

        Raises:
            UserError: libtpu is missing, or knows no such slice.
        """
        # Read by libtpu when it is first asked; without them it looks for the machine's own TPU.
        settings = {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        settings["ALLOW_MULTIPLE_LIBTPU_LOAD"] = (
            "1"  # nothing is run: several plans may be made at a time
        )
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return topologies.get_topology_desc(
                topology_name=self.name, platform="tpu", **options
            ).devices
        except (
            Exception
        ) as error:  # the runtime raises its own kinds, which are no part of JAX's interface
            reason = " ".join(str(error).split())[:160]
            if "libtpu" in reason and ("not found" in reason or "cannot open" in reason.lower()):
                raise UserError(
                    "a plan for a TPU needs its compiler: pip install -e .[tpu]"
                ) from None
            raise UserError(f"--topology={self.name}: {reason}; {_shapes_of(self.chip)}") from None


def parse_topology(text: str) -> Topology:
    """Example: "v5e:16x16x2" → two slices of 16 × 16; "v5p:8x8x16" → one slice of 8 × 8 × 16.

    Raises:
        UserError: an unknown chip or shape, with those that there are.
    """
    tpus = [chip for chip in CHIPS if chip.torus]
    name, _, sizes = text.partition(":")
    chip = next((chip for chip in tpus if chip.name == name), None)
    if chip is None:
        known = ", ".join(f"{chip.name}:{'x'.join('4' * chip.torus)}" for chip in tpus)
        raise UserError(
            f"--topology={text}: {name or 'nothing'} is no chip with a table in chips.py; write for example {known}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes):
        raise UserError(
            f"--topology={text}: sizes are written like {chip.name}:{'x'.join('4' * chip.torus)}; {_shapes_of(chip)}"
        )
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) not in (chip.torus, chip.torus + 1):
        raise UserError(
            f"--topology={text}: {chip.name} has slices of {chip.torus} axes, and after them their number; {_shapes_of(chip)}"
        )
    shape, slices = shape[: chip.torus], shape[chip.torus] if len(shape) > chip.torus else 1
    if chip.torus == 2 and tuple(sorted(shape)) not in FLAT_SHAPES:
        chips = math.prod(shape)
        nearest = sorted(
            sorted(FLAT_SHAPES, key=lambda known: abs(math.log(math.prod(known) / chips)))[:2]
        )
        raise UserError(
            f"--topology={text}: {chip.name} has no slice of {'x'.join(map(str, shape))}; the nearest are "
            f"{' and '.join(chip.name + ':' + 'x'.join(map(str, known)) for known in nearest)}"
        )
    return Topology(chip, shape, slices)


def _shapes_of(chip: Chip) -> str:
    if chip.torus == 2:
        return "slices are " + ", ".join("x".join(map(str, shape)) for shape in FLAT_SHAPES)
    return "slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4, or have axes that are multiples of 4"
