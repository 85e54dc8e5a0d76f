"""Logistic regression on the features of a frozen model."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from fastslm_jax.evaluation import metrics
from fastslm_jax.models import log_mel
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.probes import clips
from fastslm_jax.probes.clips import TARGETS, Clip

BATCH = 16  # windows
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the squared weights
SOLVER = {"maxiter": 200, "ftol": 1e-6}

# Features of a window: the means of the log-mel spectrogram, of the encoder's frames and of the
# speech tokens over time, and all speech tokens in their order.
FEATURES = ("log-mel", "encoder", "tokens", "tokens in order")


def measure(
    model: FastSLM,
    params: dict,
    seed: int = 0,
    count: int = 96,
    targets: Sequence[str] = tuple(TARGETS),
) -> list[dict]:
    """Test accuracy of linear probes for each target and each kind of features.

    Args:
        params: parameters of the model; those of the decoder are not used.
        seed: of the clips.
        count: training clips per class; there are half as many test clips.
        targets: keys of `clips.TARGETS`.

    Returns:
        Dicts with target, features, width (of the features), accuracy and its 95 % `interval` (both
        in 0 to 1), chance (one in the number of classes), majority (accuracy of always answering
        the most frequent class of the training clips), train and test (numbers of clips), recall
        (of each class) and penalty.
    """
    results = []
    for target in targets:
        sets = {
            split: list(clips.draw(target, split, size, model.window.samples, seed))
            for split, size in (("train", count), ("test", count // 2))
        }
        features = {split: extract(model, params, drawn) for split, drawn in sets.items()}
        for name in FEATURES:
            found = probe(sets, {split: x[name] for split, x in features.items()})
            classes = tuple(TARGETS[target])
            recall = dict(zip(classes, found.pop("recall"), strict=True))
            results.append({"target": target, "features": name, **found, "recall": recall})
    return results


def extract(model: FastSLM, params: dict, drawn: Sequence[Clip]) -> dict[str, np.ndarray]:
    """{name in FEATURES: float32 [clips, width]}."""
    rows = []
    for start in range(0, len(drawn), BATCH):
        cuts = [model.window.cut(clip.samples) for clip in drawn[start : start + BATCH]]
        cuts += cuts[:1] * (BATCH - len(cuts))  # one compiled program
        windows, frames = map(np.stack, zip(*cuts, strict=True))
        rows += zip(*jax.device_get(_forward(model, params, windows, frames)), strict=True)
    rows = rows[: len(drawn)]
    *means, tokens = (np.stack(part).astype(np.float32) for part in zip(*rows, strict=True))
    features = (*means, tokens.mean(axis=1), tokens.reshape(len(tokens), -1))
    return dict(zip(FEATURES, features, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    model: FastSLM, params: dict, windows: jax.Array, frames: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Windows [clips, 1, samples] → mean log-mel [clips, mels], mean encoder features [clips, d],
    speech tokens [clips, tokens, llm width]."""
    recording = np.zeros(frames.shape, np.int32)
    mel = log_mel.log_mel(windows, frames, recording, model.encoder.num_mels)
    encoded = model.encoder.apply({"params": params["encoder"]}, mel[:, 0])
    return mel[:, 0].mean(axis=1), encoded.mean(axis=1), model.speech_tokens_from_mel(params, mel)


def probe(sets: Mapping[str, Sequence[Clip]], features: Mapping[str, np.ndarray]) -> dict:
    """Trains on "train" and tests on "test"; see `measure` for the results.

    The penalty is the one with the best accuracy on a quarter of the groups of the training clips,
    before training on all of them. The interval resamples groups.
    """
    labels = {split: np.array([clip.label for clip in drawn]) for split, drawn in sets.items()}
    groups = {
        split: np.unique([clip.group for clip in drawn], return_inverse=True)[1]
        for split, drawn in sets.items()
    }
    num_classes, width = int(labels["train"].max()) + 1, features["train"].shape[1]
    mean, scale = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
    x = {split: (f - mean) / (scale * np.sqrt(width)) for split, f in features.items()}

    held_out = groups["train"] % 4 == 0
    scores = []
    for penalty in PENALTIES:
        model = fit(x["train"][~held_out], labels["train"][~held_out], num_classes, penalty)
        scores.append(np.mean(predict(model, x["train"][held_out]) == labels["train"][held_out]))
    penalty = PENALTIES[int(np.argmax(scores))]
    model = fit(x["train"], labels["train"], num_classes, penalty)
    correct = predict(model, x["test"]) == labels["test"]
    by_group = np.stack([np.bincount(groups["test"], correct), np.bincount(groups["test"])], axis=1)
    majority = np.bincount(labels["train"]).argmax()
    return {
        "width": width,
        "accuracy": float(correct.mean()),
        "interval": metrics.bootstrap(lambda sums: sums[..., 0] / sums[..., 1], by_group),
        "chance": 1 / num_classes,
        "majority": float(np.mean(labels["test"] == majority)),
        "train": len(labels["train"]),
        "test": len(labels["test"]),
        "recall": [float(correct[labels["test"] == k].mean()) for k in range(num_classes)],
        "penalty": penalty,
    }


def fit(x: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float) -> np.ndarray:
    """Multinomial logistic regression with an L2 penalty on the weights, not on the bias.

    Args:
        x: [clips, width].
        labels: [clips], class numbers.

    Returns:
        [width + 1, classes]: weights, and the bias in the last row.
    """
    x, targets = np.asarray(x, np.float64), np.eye(num_classes)[labels]
    shape = (x.shape[1] + 1, num_classes)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss and its gradient."""
        weights, bias = np.split(flat.reshape(shape), [-1])
        log_probabilities = log_softmax(x @ weights + bias, axis=1)
        loss = -np.mean((log_probabilities * targets).sum(axis=1))
        error = (np.exp(log_probabilities) - targets) / len(x)
        gradient = np.vstack([x.T @ error + penalty * weights, error.sum(axis=0)])
        return loss + penalty / 2 * np.square(weights).sum(), gradient.ravel()

    start = np.zeros(shape[0] * shape[1])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=SOLVER)
    return found.x.reshape(shape)


def predict(model: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Classes [clips] of x [clips, width] by the result of `fit`."""
    return (x @ model[:-1] + model[-1]).argmax(axis=1)
