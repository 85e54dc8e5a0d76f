"""Recordings → speech tokens, with programs that do not depend on a recording's length."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from fastslm_jax.inference import programs
from fastslm_jax.models import log_mel
from fastslm_jax.models.fastslm import FastSLM


@dataclasses.dataclass(frozen=True)
class SpeechEncoder:
    """Encodes windows in micro-batches of `window_batch`; a single window is encoded alone.

    Attributes:
        window_batch: windows per micro-batch, a multiple of the devices that share them.
        mesh: the mesh of the parameters; None: one device.
    """

    model: FastSLM
    params: dict
    window_batch: int
    mesh: Mesh | None = None

    def __call__(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Recordings, int16 [samples] each → speech tokens [windows · tokens_per_window, d] each.

        Takes several recordings that fit one micro-batch together, or one recording of any length.
        A long one is read twice, because log-mel needs the maximum of the whole recording first.
        """
        spec = self.model.window
        frames = [spec.valid_frames(len(samples)) for samples in recordings]
        counts = [len(part) for part in frames]
        if sum(counts) > self.window_batch and len(counts) > 1:
            raise ValueError(
                f"{len(counts)} recordings have {sum(counts)} windows together, "
                f"a micro-batch takes {self.window_batch}"
            )
        rows = 1 if sum(counts) == 1 else self.window_batch
        batches = list(range(0, sum(counts), rows))
        numbers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

        def inputs(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """(windows, valid frames, recording) of a micro-batch, padded to its size."""
            stop = min(start + rows, sum(counts))
            if len(counts) == 1:
                windows = spec.windows(recordings[0], start, stop)
            else:
                parts = zip(recordings, counts, strict=True)
                windows = np.concatenate([spec.windows(samples, 0, n) for samples, n in parts])
            valid = np.concatenate(frames)[start:stop]
            return _pad(windows, rows, 0), _pad(valid, rows, 0), _pad(numbers[start:stop], rows, -1)

        maximum = log_mel.LOWEST
        if len(batches) > 1:
            maximum = max(self._maxima(*inputs(start)[:2]) for start in batches)
        elsewhere = np.full(rows, maximum, np.float32)
        encoded = [self._encode(*inputs(start), elsewhere) for start in batches]
        tokens = np.concatenate(encoded)[: sum(counts)]
        split = np.split(tokens, np.cumsum(counts)[:-1])
        return [part.reshape(-1, part.shape[-1]) for part in split]

    # Both wait for the device, so that it contains the inputs of one micro-batch at most.

    def _maxima(self, windows: np.ndarray, frames: np.ndarray) -> float:
        maxima = programs.window_maxima(self.model, windows, frames, mesh=self.mesh)
        return float(np.max(np.asarray(maxima)))

    def _encode(self, *inputs: np.ndarray) -> np.ndarray:
        return np.asarray(programs.encode(self.model, self.params, *inputs, mesh=self.mesh))

    def groups(self, window_counts: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive requests whose windows share a micro-batch; 0 windows: without audio."""
        members: list[int] = []
        windows = 0
        for i, count in enumerate(window_counts):
            if members and windows + count > self.window_batch:
                yield members
                members, windows = [], 0
            members.append(i)
            windows += count
        if members:
            yield members


def _pad(array: np.ndarray, rows: int, fill: int) -> np.ndarray:
    missing = np.full((rows - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, missing])
