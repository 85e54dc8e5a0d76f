"""Long-form plan: which clips make which example. Metadata only; a pure function of (index, seed, epoch).

An example is one clip, or, for long-form training, clips of one task joined to a recording of a drawn length.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import semantic
from fastslm_jax.data.manifest import Segment, Utterance
from fastslm_jax.errors import UserError

GROUPINGS = ("random", "speaker", "recording", "semantic")
DISTRIBUTIONS = ("uniform", "log_uniform")


@dataclasses.dataclass(frozen=True)
class LongForm:
    """Recordings of min_seconds … max_seconds, clips gap_seconds (uniform) apart.

    grouping: "random" clips; clips of one "speaker"; clips of one "recording" in their real order; "semantic": clips whose
        transcripts are alike (see `data.semantic`).
    distribution: of the lengths: "uniform", or "log_uniform" (as many of 1 … 2 minutes as of 7 … 14).
    """

    min_seconds: float
    max_seconds: float
    grouping: str = "random"
    gap_seconds: tuple[float, float] = (0.2, 0.6)
    distribution: str = "uniform"

    def __post_init__(self):
        if self.grouping not in GROUPINGS:
            raise UserError(f"grouping {self.grouping!r} is not one of {', '.join(GROUPINGS)}")
        if self.distribution not in DISTRIBUTIONS:
            raise UserError(
                f"distribution {self.distribution!r} is not one of {', '.join(DISTRIBUTIONS)}"
            )
        if not 0 < self.min_seconds <= self.max_seconds:
            raise UserError(
                f"long-form lengths {self.min_seconds} … {self.max_seconds} s are not a range"
            )
        if len(self.gap_seconds) != 2 or not 0 <= self.gap_seconds[0] <= self.gap_seconds[1]:
            raise UserError(f"gaps of {self.gap_seconds} s are not a range")

    def draw(self, rng: np.random.Generator) -> float:
        """The length of a recording in seconds."""
        if self.distribution == "uniform":
            return rng.uniform(self.min_seconds, self.max_seconds)
        return float(np.exp(rng.uniform(np.log(self.min_seconds), np.log(self.max_seconds))))


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Clips of the index, each after its gap in samples; one clip without a gap is a short-form example.

    Example: Example(source=0, clips=(4, 9), gaps=(0, 4800)) is clip 4, 0.3 s of silence, clip 9.
    """

    source: int
    clips: tuple[int, ...]
    gaps: tuple[int, ...] = (0,)


def single_examples(source: int, num_clips: int, rng: np.random.Generator) -> list[Example]:
    """Every clip once, in random order."""
    return [Example(source, (clip,)) for clip in rng.permutation(num_clips).tolist()]


def _order(
    index: Sequence[Utterance], plan: LongForm, rng: np.random.Generator, vectors
) -> list[list[int]]:
    """Runs of clips that may be joined, in the order in which they are."""
    if plan.grouping == "random":
        return [rng.permutation(len(index)).tolist()]
    if plan.grouping == "semantic":
        return [
            semantic.order(
                semantic.vectors([u.text for u in index]) if vectors is None else vectors, rng
            )
        ]
    groups: dict[str, list[int]] = {}
    for clip, utterance in enumerate(index):
        groups.setdefault(
            utterance.speaker if plan.grouping == "speaker" else utterance.recording, []
        ).append(clip)
    runs = [groups[name] for name in sorted(groups)]
    if plan.grouping == "speaker":
        runs = [rng.permutation(run).tolist() for run in runs]
    else:
        runs = [sorted(run, key=lambda clip: (index[clip].offset, clip)) for run in runs]
    return [runs[i] for i in rng.permutation(len(runs))]


def joined_examples(
    source: int,
    index: Sequence[Utterance],
    plan: LongForm,
    rng: np.random.Generator,
    *,
    tokens: Sequence[int] | None = None,
    takes: Callable[[int, int, int], bool] = lambda first, samples, tokens: True,
    vectors=None,
) -> list[Example]:
    """Every clip once, joined to recordings whose lengths follow the plan; a run's last one may be shorter.

    Args:
        tokens: of every clip's answer.
        takes: may a recording that begins with the clip `first`, of so many samples and tokens, stand in a row? If not, it ends
            before the clip that is too much.
        vectors: `semantic.vectors` of the texts, for the semantic grouping (made here if None).
    """
    examples = []
    for run in _order(index, plan, rng, vectors):
        clips, gaps, length, samples, count, target = [], [], 0.0, 0, 0, plan.draw(rng)
        for clip in run:
            gap, more = (
                rng.uniform(*plan.gap_seconds) if clips else 0.0,
                0 if tokens is None else tokens[clip],
            )
            clip_seconds, clip_samples = index[clip].seconds, index[clip].num_samples
            if clips and (
                length + gap + clip_seconds > target
                or not takes(
                    clips[0], samples + round(gap * SAMPLE_RATE) + clip_samples, count + more
                )
            ):
                examples.append(Example(source, tuple(clips), tuple(gaps)))
                clips, gaps, length, samples, count, gap = [], [], 0.0, 0, 0, 0.0
                target = plan.draw(rng)
            clips.append(clip)
            gaps.append(round(gap * SAMPLE_RATE))
            length, samples, count = (
                length + gap + clip_seconds,
                samples + gaps[-1] + clip_samples,
                count + more,
            )
        if clips:
            examples.append(Example(source, tuple(clips), tuple(gaps)))
    return examples


def split(utterance: Utterance, fits: Callable[[Utterance], bool]) -> list[Utterance]:
    """A transcribed recording that is too long, split at its segments' boundaries into pieces that fit, each as long as can be.
    Empty if that is not possible: nothing is ever cut elsewhere, nor is a translation or a summary.

    Example: segments of 20 s each, three of them, where 45 s fit → pieces of 40 s and 20 s, named id.1 and id.2.
    """
    if not utterance.segments or utterance.task != "asr" or utterance.answer != utterance.text:
        return []
    pieces, open_segments = [], []

    def piece(segments: Sequence[Segment]) -> Utterance:
        start, text = segments[0].start, " ".join(segment.text for segment in segments)
        return dataclasses.replace(
            utterance, offset=utterance.offset + start, seconds=segments[-1].end - start, answer=text, text=text,
            segments=tuple(Segment(s.start - start, s.end - start, s.text) for s in segments),
            id=f"{utterance.id}.{len(pieces) + 1}", text_tokens=None, joined_tokens=None,
        )  # fmt: skip

    for segment in utterance.segments:
        if open_segments and not fits(piece([*open_segments, segment])):
            pieces.append(piece(open_segments))
            open_segments = []
        open_segments.append(segment)
        if not fits(piece(open_segments)):
            return []
    return [*pieces, piece(open_segments)]
