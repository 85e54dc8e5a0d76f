"""Rebuilds the weights of the golden numbers bit for bit, without PyTorch.

The authors' modules were initialized by PyTorch's CPU generator with one seed, then randomized.
`weights.json` lists for every tensor its distribution and the offset of its draws in the
generator's stream (MT19937, 24 bits per float32). PyTorch computes normal variates (Box-Muller)
and the position table in float32; the results here differ from it by a few units in the last
place, and `weights.npz` stores these differences. A CRC-32 per tensor checks the result.
"""

import json
import math
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent


def build() -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors` by name.

    Raises:
        ValueError: a tensor does not match its checksum.
    """
    table = json.loads((FOLDER / "weights.json").read_text())
    generator = np.random.RandomState(table["seed"])
    stream = generator.randint(0, 2**32, table["stream_length"], dtype=np.uint32) & 0xFFFFFF
    uniforms = stream.astype(np.float32) * np.float32(2**-24)
    corrections = np.load(FOLDER / "weights.npz")
    normal_corrections, at = corrections["normal"], 0
    positions = _add_ulps(_sinusoids(*corrections["positions"].shape), corrections["positions"])
    tensors = {}
    for name, entry in table["tensors"].items():
        shape, offset = entry["shape"], entry.get("offset", 0)
        draws = uniforms[offset : offset + math.prod(shape)]
        if entry["distribution"] == "positions":
            tensor = positions[: shape[0]].copy()
        elif entry["distribution"] == "uniform":
            tensor = _uniform(draws, fan_in=math.prod(shape[1:]))
        else:
            tensor = _normal(draws)
        for scale in entry.get("scales", ()):
            tensor = tensor * np.float32(scale)
        tensor = (tensor + np.float32(entry.get("shift", 0))).reshape(shape)
        if entry["distribution"] == "normal":
            ulps = normal_corrections[at : at + tensor.size].reshape(shape)
            tensor, at = _add_ulps(tensor, ulps), at + tensor.size
        if zlib.crc32(tensor.tobytes()) != entry["crc32"]:
            raise ValueError(f"{name}: rebuilt tensor does not match its checksum in weights.json")
        tensors[name] = tensor
    for name, source in table["copies"].items():
        tensors[name] = tensors[source].copy()
    return tensors


def _uniform(draws: np.ndarray, fan_in: int) -> np.ndarray:
    """PyTorch's default initialization of linear layers and convolutions."""
    bound = np.float32(math.sqrt(3.0) * (math.sqrt(1 / 3) / math.sqrt(fan_in)))
    # Double precision, rounded once, gives the value of PyTorch's fused multiply-add.
    return (draws.astype(np.float64) * (2.0 * bound) - bound).astype(np.float32)


def _normal(draws: np.ndarray) -> np.ndarray:
    """Box-Muller on groups of 16 draws, rounded to float32 where PyTorch rounds."""
    pairs = draws.reshape(-1, 2, 8)
    log = np.log(1.0 - pairs[:, 0].astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    theta = (np.float32(2 * np.pi) * pairs[:, 1]).astype(np.float64)
    cosine, sine = np.cos(theta).astype(np.float32), np.sin(theta).astype(np.float32)
    return np.stack([radius * cosine, radius * sine], axis=1).ravel()


def _sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's position table, rounded to float32 where PyTorch rounds."""
    increment = np.float32(-np.log(10_000) / (width // 2 - 1))
    exponents = increment * np.arange(width // 2, dtype=np.float32)
    inverse_timescales = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_timescales
    angles = angles.astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _add_ulps(values: np.ndarray, ulps: np.ndarray) -> np.ndarray:
    """Moves float32 values by units in the last place."""
    return (values.view(np.int32) + ulps).view(np.float32)
