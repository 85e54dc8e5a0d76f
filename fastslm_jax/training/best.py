"""The best checkpoint of a run, by the scores that decoding of the dev set gave."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from orbax.checkpoint import checkpoint_managers

# Main scores of tasks (see `evaluation.metrics`), the deciding one first: is lower better?
LOWER_IS_BETTER = {"wer": True, "cer": True, "chrf": False, "rougeL": False, "em": False}
Scores = Mapping[str, float]


def finite(scores: Scores) -> dict[str, float]:
    """The main scores that could be computed."""
    return {
        name: float(scores[name])
        for name in LOWER_IS_BETTER
        if name in scores and math.isfinite(scores[name])
    }


def best_step(scores: Mapping[int, Scores]) -> int | None:
    """The step with the best dev score; of equals, the latest.

    The newest scored step's first metric in the order of LOWER_IS_BETTER decides; steps without
    that metric are left out.

    Args:
        scores: {step: scores}; {} for a step that was not scored.
    """
    scored = {step: found for step, parts in scores.items() if (found := finite(parts))}
    if not scored:
        return None
    metric = next(iter(scored[max(scored)]))
    sign = -1 if LOWER_IS_BETTER[metric] else 1
    return max((sign * parts[metric], step) for step, parts in scored.items() if metric in parts)[1]


@dataclasses.dataclass(frozen=True)
class KeepBest(checkpoint_managers.PreservationPolicy):
    """Orbax policy that preserves the best checkpoint.

    Unlike Orbax's BestN, it takes the scores from the metadata of the checkpoints, whose checksum
    covers them, so that a resumed run knows them.

    Attributes:
        scores_of: step → scores.
    """

    scores_of: Callable[[int], Scores]

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        best = best_step({step: self.scores_of(step) for step in steps})
        return [step == best for step in steps]
