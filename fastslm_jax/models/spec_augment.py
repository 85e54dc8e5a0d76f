"""SpecAugment (arXiv 1904.08779) without time warping: masks over mel bands and frames."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Masks for log-mel windows in training. Each window has its own; masks may overlap.

    Attributes:
        freq_masks: masks over mel bands, per window.
        freq_width: largest width of one, in bands; widths are uniform from 0.
        time_masks: masks over frames, per window.
        time_width: largest width of one, as a fraction of the window.
    """

    freq_masks: int = 0
    freq_width: int = 0
    time_masks: int = 0
    time_width: float = 0.0

    @property
    def is_on(self) -> bool:
        return self.freq_masks > 0 or self.time_masks > 0

    def __call__(self, mel: jax.Array, rng: jax.Array) -> jax.Array:
        """mel [rows, windows, frames, bands] → the same with masked parts set to 0.

        0 is also what padding has, and lies within the range of normalized speech.
        """
        rows, windows, frames, bands = mel.shape
        freq_rng, time_rng = jax.random.split(rng)
        freq_width = min(self.freq_width, bands)
        time_width = int(self.time_width * frames)
        band = _masked(freq_rng, (rows, windows, self.freq_masks), bands, freq_width)
        frame = _masked(time_rng, (rows, windows, self.time_masks), frames, time_width)
        return jnp.where(frame[..., None] | band[:, :, None, :], 0.0, mel)


def _masked(rng: jax.Array, shape: tuple[int, int, int], size: int, width: int) -> jax.Array:
    """Which of `size` places any mask covers: [rows, windows, size].

    shape: [rows, windows, masks].
    """
    width_rng, start_rng = jax.random.split(rng)
    widths = jax.random.randint(width_rng, shape, 0, width + 1)
    starts = jax.random.randint(start_rng, shape, 0, size - widths + 1)
    place = jnp.arange(size)
    covered = (place >= starts[..., None]) & (place < (starts + widths)[..., None])
    return jnp.any(covered, axis=2)
