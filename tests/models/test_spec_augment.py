"""SpecAugment: the share, size and place of its masks."""

import jax
import numpy as np
import pytest

from fastslm_jax.models.spec_augment import SpecAugment

ROWS, WINDOWS, FRAMES, BANDS = 4, 50, 60, 16
MEL = np.ones((ROWS, WINDOWS, FRAMES, BANDS), np.float32)


def is_masked(**masks) -> np.ndarray:
    return np.asarray(SpecAugment(**masks)(MEL, jax.random.key(0))) == 0


def widths_of(covered: np.ndarray) -> np.ndarray:
    """[rows, windows, places] of one mask each → its widths, after a check that it is one run."""
    starts = covered & ~np.pad(covered, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    assert starts.sum(axis=2).max() == 1
    return covered.sum(axis=2)


def test_a_mask_over_bands_covers_all_frames_and_up_to_its_width():
    masked = is_masked(freq_masks=1, freq_width=5)
    assert (masked == masked[:, :, :1]).all()
    widths = widths_of(masked[:, :, 0])
    assert set(widths.ravel()) == {0, 1, 2, 3, 4, 5}  # windows differ
    assert masked[:, :, 0].any(axis=(0, 1)).all()  # every band, the first and the last as well


def test_a_mask_over_frames_covers_all_bands_and_up_to_its_fraction():
    masked = is_masked(time_masks=1, time_width=0.1)
    assert (masked == masked[..., :1]).all()
    assert set(widths_of(masked[..., 0]).ravel()) == set(range(7))
    assert masked[..., 0].any(axis=(0, 1)).all()


def test_several_masks_cover_more():
    one, three = (is_masked(time_masks=count, time_width=0.1).mean() for count in (1, 3))
    assert one == pytest.approx(0.05, rel=0.2)  # the mean width is half of the largest
    assert 2.5 * one < three < 3 * one  # some overlap


def test_widths_beyond_the_window_are_cut():
    assert widths_of(is_masked(freq_masks=1, freq_width=99)[:, :, 0]).max() == BANDS


def test_what_is_not_masked_stays():
    mel = np.random.default_rng(0).normal(size=MEL.shape).astype(np.float32)
    masked = np.asarray(SpecAugment(2, 4, 2, 0.1)(mel, jax.random.key(1)))
    assert ((masked == 0) | (masked == mel)).all()
    assert 0.1 < (masked == 0).mean() < 0.6
