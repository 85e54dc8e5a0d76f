"""Logistic regression, its penalty and baselines; and the probes of a model."""

import jax
import numpy as np
import pytest
from scipy.special import softmax

from fastslm_jax.probes import clips, measure
from fastslm_jax.probes.__main__ import table
from fastslm_jax.probes.clips import Clip


def made(labels, groups) -> list[Clip]:
    pairs = zip(labels, groups, strict=True)
    return [Clip(np.zeros(0, np.int16), int(label), str(group)) for label, group in pairs]


def test_without_information_the_probe_learns_the_class_frequencies():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    model = measure.fit(np.zeros((10, 4)), labels, 3, penalty=1e-3)
    np.testing.assert_allclose(softmax(model[-1]), [0.6, 0.3, 0.1], atol=2e-3)
    np.testing.assert_allclose(model[:-1], 0)


def test_the_gradient_of_the_penalized_loss_is_zero():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    model = measure.fit(x, labels, 3, penalty=0.1)
    error = softmax(x @ model[:-1] + model[-1], axis=1) - np.eye(3)[labels]
    np.testing.assert_allclose(x.T @ error / 60, -0.1 * model[:-1], atol=1e-3)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=1e-3)


def test_a_linear_class_is_found_on_new_groups_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(240) % 3, "test": np.arange(120) % 3}
    sets = {split: made(y, np.arange(len(y)) // 6) for split, y in labels.items()}
    noise = {split: rng.normal(size=(len(y), 8)) for split, y in labels.items()}
    # A large offset that does not matter, and one direction that has the class.
    signal = {split: 3 * np.eye(8)[y] + noise[split] + 100 for split, y in labels.items()}

    found = measure.probe(sets, signal)
    assert found["accuracy"] > 0.9
    assert min(found["recall"]) > 0.8
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert found["chance"] == found["majority"] == pytest.approx(1 / 3)
    assert (found["train"], found["test"], found["width"]) == (240, 120, 8)
    assert 0.2 < measure.probe(sets, noise)["accuracy"] < 0.47


def test_the_majority_baseline_is_that_of_the_training_clips():
    sets = {"train": made([0, 0, 0, 1], range(4)), "test": made([0, 1, 1, 1], range(4))}
    found = measure.probe(sets, {split: np.zeros((4, 2)) for split in sets})
    assert found["majority"] == found["accuracy"] == 0.25


def test_the_interval_resamples_groups():
    """With all test clips in two groups, one right and one wrong, nearly nothing is known."""
    test = [0] * 5 + [1] * 5
    sets = {"train": made([0, 1] * 8, range(16)), "test": made(test, test)}
    x = {"train": np.array([0.0, 1.0] * 8)[:, None], "test": np.zeros((10, 1))}
    assert measure.probe(sets, x)["interval"] == [0.0, 1.0]


def test_the_features_of_a_window(model, params):
    rng = np.random.default_rng(0)
    length = model.window.samples
    drawn = [Clip(rng.normal(0, 2000, length).astype(np.int16), 0, str(i)) for i in range(18)]
    features = measure.extract(model, params, drawn)
    shapes = {name: x.shape for name, x in features.items()}
    assert shapes == {
        "log-mel": (18, 16),
        "encoder": (18, 64),
        "tokens": (18, 32),
        "tokens in order": (18, 96),
    }
    ordered = features["tokens in order"].reshape(18, 3, 32)
    np.testing.assert_allclose(ordered.mean(axis=1), features["tokens"], rtol=1e-5, atol=1e-6)
    last = measure.extract(model, params, drawn[17:])  # in another batch
    np.testing.assert_allclose(last["encoder"][0], features["encoder"][17], rtol=1e-4, atol=1e-5)
    windows, frames = model.window.cut(drawn[17].samples)
    recording = np.zeros((1, 1), np.int32)
    tokens = jax.jit(model.speech_tokens)(params, windows[None], frames[None], recording)
    np.testing.assert_allclose(ordered[17], tokens[0], rtol=1e-4, atol=1e-5)


def test_random_features_tell_a_tone_from_speech(model, params):
    """Even an untrained model has them; the table has a row per target."""
    pytest.importorskip("espeakng_loader")
    results = measure.measure(model, params, count=8, targets=("sound",))
    assert [result["features"] for result in results] == list(measure.FEATURES)
    assert all(tuple(result["recall"]) == tuple(clips.TARGETS["sound"]) for result in results)
    assert results[0]["accuracy"] > 0.4
    assert table(results).splitlines()[2].startswith("| sound | 5 | 20.0 | 20.0 | ")
