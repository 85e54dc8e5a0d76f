"""Accelerator specifications, and topologies to compile for: TPU slices and nodes of GPUs.

Sources: https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x (key specifications per chip;
the DCN bandwidth of v5e is that of two 100 Gb/s NICs shared by eight chips), and the NVIDIA data
sheets of A100, H100 SXM, H200 SXM, DGX B200, GB200 NVL72 and L4 (dense bfloat16, half of the rate
with sparsity). The network of a GPU is one NIC per GPU: 200 Gb/s in a DGX A100, 400 Gb/s in the
others. An L4 has no NVLink: its figure is PCIe 4.0 x16, and its network an assumed 100 Gb/s.
Vendors list interconnect bandwidth as the sum of both directions over all ports; the table has half
of it, what a chip can send. `targets/` has what XLA's GPU compiler must know of a card.
"""

import dataclasses
import importlib.resources
import math
import os
import re

import jax
from jax.experimental import topologies

from fastslm_jax.errors import UserError
from fastslm_jax.memory import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip. Bandwidths are in bytes per second."""

    name: str
    device_kinds: tuple[str, ...]  # values of jax.Device.device_kind
    hbm_bytes: float
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bandwidth: float
    ici_bandwidth: float  # sent over all ports: ICI of a TPU, NVLink of a GPU
    dcn_bandwidth: float  # sent over the data-center network
    torus: int = 0  # dimensions of the ICI torus; 0 for a switched network
    devices: int = 1  # JAX devices per chip
    target: str = ""  # of a GPU: its name in topologies, and of its file in targets/
    node: int = 8  # of a GPU: largest number connected by NVLink


CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 819e9, 200e9, 3.125e9, torus=2),
    Chip("v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2765e9, 600e9, 6.25e9, torus=3),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1638e9, 400e9, 12.5e9, torus=2),
    Chip("tpu7x", ("TPU7x",), 192 * GIB, 2307e12, 7380e9, 600e9, 12.5e9, torus=3, devices=2),
    # 24 GB, of which ECC takes 6 %: what nvidia-smi reports.
    Chip("L4", ("NVIDIA L4",), 23_034 * 2**20, 121e12, 300e9, 32e9, 12.5e9, target="l4"),
    Chip("A100-40GB", ("NVIDIA A100-SXM4-40GB",), 40 * GIB, 312e12, 1555e9, 300e9, 25e9),
    Chip(
        *("A100-80GB", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 312e12, 2039e9, 300e9, 25e9),
        target="a100-80",
    ),
    Chip(
        *("H100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 989e12, 3350e9, 450e9, 50e9),
        target="h100",
    ),
    Chip("H200", ("NVIDIA H200",), 141 * GIB, 989e12, 4800e9, 450e9, 50e9, target="h200"),
    Chip("B200", ("NVIDIA B200",), 191.5e9, 2250e12, 7672e9, 900e9, 50e9, target="b200"),
    Chip(
        *("GB200", ("NVIDIA GB200",), 197.9e9, 2500e12, 7928e9, 900e9, 50e9),
        target="gb200",
        node=72,
    ),
)
# {torus dimensions: n}: an axis of a slice has wraparound links if its size is a multiple of n.
WRAPAROUND = {2: 16, 3: 4}
# Slice shapes of the chips with a 2D torus.
SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def of_device(device: jax.Device) -> Chip | None:
    """The chip of a device, or None if it is not in CHIPS (a CPU, for example)."""
    return next((chip for chip in CHIPS if device.device_kind in chip.device_kinds), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One TPU slice, or several identical slices connected by the data-center network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """Name of one slice, as libtpu expects it."""
        return _slice_name(self.chip, self.shape)

    def devices(self) -> list[jax.Device]:
        """Devices to compile for. They cannot run anything. Requires libtpu.

        Raises:
            UserError: libtpu is not installed or does not support the slice.
        """
        # libtpu reads these when it is loaded. They stop it from looking for a local TPU and let
        # several plans be compiled at the same time.
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            os.environ.setdefault(name, value)
        options = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            topology = topologies.get_topology_desc(
                topology_name=self.name, platform="tpu", **options
            )
        except Exception as error:  # the runtime's exception types are not public in JAX
            reason = " ".join(str(error).split())[:160]
            if "libtpu" in reason and ("not found" in reason or "cannot open" in reason.lower()):
                raise UserError(
                    "--topology: compiling for a TPU requires libtpu; run pip install -e .[tpu]"
                ) from None
            raise UserError(
                f"--topology={self.name}: {reason}; {_supported_shapes(self.chip)}"
            ) from None
        return topology.devices


@dataclasses.dataclass(frozen=True)
class GPUTopology:
    """Nodes of GPUs: NVLink connects those of a node, a network the nodes."""

    chip: Chip
    gpus: int  # per node
    nodes: int = 1

    @property
    def chips(self) -> int:
        """Number of GPUs in all nodes."""
        return self.gpus * self.nodes

    @property
    def name(self) -> str:
        nodes = f"x{self.nodes}" if self.nodes > 1 else ""
        return f"{self.chip.target}:{self.gpus}{nodes}"

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, with one process per node. They cannot run anything.

        Raises:
            UserError: JAX's CUDA plugin is not installed.
        """
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # do not look for local GPUs
        target = importlib.resources.files("fastslm_jax") / f"targets/{self.chip.target}.txtpb"
        try:
            topology = topologies.get_topology_desc(
                platform="cuda",
                target_config=target.read_text(encoding="utf-8"),
                topology=f"{self.nodes}x1x{self.gpus}",
            )
        except NotImplementedError:
            raise UserError(
                f"--topology={self.name}: compiling for a GPU requires JAX's CUDA plugin and "
                "cuDNN; run pip install -e .[plan-gpu]"
            ) from None
        return topology.devices


def node_of(device: jax.Device) -> int:
    """Number of the fast network that a device belongs to: a TPU slice, or a process of GPUs."""
    if getattr(device, "platform", "") == "gpu":
        return device.process_index
    return getattr(device, "slice_index", 0) or 0


def parse_topology(text: str) -> Topology | GPUTopology:
    """Parses the name of a topology.

    Example: "v5p:8x8x16" → one slice of 8 × 8 × 16; "v5e:16x16x2" → two slices of 16 × 16;
    "h100:8x4" → four nodes of eight GPUs.

    Raises:
        UserError: the chip or the shape does not exist; the message lists valid ones.
    """
    tpus = {chip.name: chip for chip in CHIPS if chip.torus}
    gpus = {chip.target: chip for chip in CHIPS if chip.target}
    name, _, sizes = text.partition(":")
    if name in gpus:
        return _parse_gpus(text, gpus[name], sizes)
    if name not in tpus:
        known = ", ".join(
            [*map(_example, tpus.values()), *(f"{c.target}:{c.node}" for c in gpus.values())]
        )
        raise UserError(
            f"--topology={text}: unknown TPU or GPU {name!r}; valid topologies are {known}, …"
        )
    chip = tpus[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes):
        raise UserError(
            f"--topology={text}: expected a shape such as {_example(chip)}; "
            f"{_supported_shapes(chip)}"
        )
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) not in (chip.torus, chip.torus + 1):
        raise UserError(
            f"--topology={text}: a {chip.name} slice has {chip.torus} dimensions, optionally "
            f"followed by the number of slices; {_supported_shapes(chip)}"
        )
    shape, slices = shape[: chip.torus], math.prod(shape[chip.torus :])
    if chip.torus == 2 and tuple(sorted(shape)) not in SHAPES_2D:
        distances = {s: abs(math.log(math.prod(s) / math.prod(shape))) for s in SHAPES_2D}
        nearest = sorted(sorted(SHAPES_2D, key=distances.get)[:2])
        raise UserError(
            f"--topology={text}: there is no {_slice_name(chip, shape)} slice; the nearest are "
            f"{' and '.join(_slice_name(chip, shape) for shape in nearest)}"
        )
    return Topology(chip, shape, slices)


def _parse_gpus(text: str, chip: Chip, sizes: str) -> GPUTopology:
    """Parses "8" or "8x4": GPUs of a node, and nodes."""
    expected = (
        f"expected the GPUs of a node, at most {chip.node}, and the number of nodes: "
        f"{chip.target}:{chip.node} or {chip.target}:{chip.node}x4"
    )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", sizes):
        raise UserError(f"--topology={text}: {expected}")
    gpus, nodes = map(int, f"{sizes}x1".split("x")[:2])
    if gpus > chip.node:
        raise UserError(f"--topology={text}: {expected}")
    return GPUTopology(chip, gpus, nodes)


def _slice_name(chip: Chip, shape: tuple[int, ...]) -> str:
    return f"{chip.name}:{'x'.join(map(str, shape))}"


def _example(chip: Chip) -> str:
    return _slice_name(chip, (4,) * chip.torus) if chip.torus else f"{chip.target}:{chip.node}"


def _supported_shapes(chip: Chip) -> str:
    if chip.torus == 2:
        return "supported slices are " + ", ".join("x".join(map(str, s)) for s in SHAPES_2D)
    return "supported slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4, or have dimensions divisible by 4"
