"""Long-form plan: which clips make which example. Metadata only; a pure function of (index, seed, epoch).

An example is one clip, or, for long-form training, clips of one task joined to a recording of a drawn length.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.manifest import Utterance
from fastslm_jax.errors import UserError

GROUPINGS = ("random", "speaker", "recording")


@dataclasses.dataclass(frozen=True)
class LongForm:
    """Recordings of min_seconds … max_seconds (uniform), clips gap_seconds (uniform) apart.

    grouping: "random" clips; clips of one "speaker"; clips of one "recording" in their real order.
    """

    min_seconds: float
    max_seconds: float
    grouping: str = "random"
    gap_seconds: tuple[float, float] = (0.2, 0.6)

    def __post_init__(self):
        if self.grouping not in GROUPINGS:
            raise UserError(f"grouping {self.grouping!r} is not one of {', '.join(GROUPINGS)}")
        if not 0 < self.min_seconds <= self.max_seconds:
            raise UserError(f"long-form lengths {self.min_seconds} … {self.max_seconds} s are not a range")


@dataclasses.dataclass(frozen=True)
class Example:
    """Clips of the index, each after its gap in samples; one clip without a gap is a short-form example.

    Example: Example(source=0, clips=(4, 9), gaps=(0, 4800)) is clip 4, 0.3 s of silence, clip 9.
    """

    source: int
    clips: tuple[int, ...]
    gaps: tuple[int, ...] = (0,)


def single_examples(source: int, num_clips: int, rng: np.random.Generator) -> list[Example]:
    """Every clip once, in random order."""
    return [Example(source, (int(clip),)) for clip in rng.permutation(num_clips)]


def _order(index: Sequence[Utterance], plan: LongForm, rng: np.random.Generator) -> list[list[int]]:
    """Runs of clips that may be joined, in the order in which they are."""
    if plan.grouping == "random":
        return [rng.permutation(len(index)).tolist()]
    groups: dict[str, list[int]] = {}
    for clip, utterance in enumerate(index):
        groups.setdefault(utterance.speaker if plan.grouping == "speaker" else utterance.recording, []).append(clip)
    runs = [groups[name] for name in sorted(groups)]
    if plan.grouping == "speaker":
        runs = [rng.permutation(run).tolist() for run in runs]
    else:
        runs = [sorted(run, key=lambda clip: (index[clip].offset, clip)) for run in runs]
    return [runs[i] for i in rng.permutation(len(runs))]


def joined_examples(source: int, index: Sequence[Utterance], plan: LongForm, rng: np.random.Generator) -> list[Example]:
    """Every clip once, joined to recordings whose lengths follow the plan; a run's last one may be shorter."""
    examples = []
    for run in _order(index, plan, rng):
        clips, gaps, length, target = [], [], 0.0, rng.uniform(plan.min_seconds, plan.max_seconds)
        for clip in run:
            gap = rng.uniform(*plan.gap_seconds) if clips else 0.0
            if clips and length + gap + index[clip].seconds > target:
                examples.append(Example(source, tuple(clips), tuple(gaps)))
                clips, gaps, length, gap = [], [], 0.0, 0.0
                target = rng.uniform(plan.min_seconds, plan.max_seconds)
            clips.append(clip)
            gaps.append(round(gap * SAMPLE_RATE))
            length += gap + index[clip].seconds
        if clips:
            examples.append(Example(source, tuple(clips), tuple(gaps)))
    return examples
