"""Planning of long recordings: which clips are concatenated into which example.

The plan needs metadata only and is a pure function of (index, settings, random generator). An
example is one clip, or several clips of one task that together form a recording of a random length.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import semantic
from fastslm_jax.data.manifest import Segment, Utterance, lack_text
from fastslm_jax.errors import UserError

GROUPINGS = ("random", "speaker", "recording", "semantic")
DISTRIBUTIONS = ("uniform", "log_uniform")


@dataclasses.dataclass(frozen=True)
class LongForm:
    """Settings of long recordings.

    Attributes:
        min_seconds: shortest recording.
        max_seconds: longest recording.
        grouping: which clips may share a recording: "random" (any), "speaker" (clips of one
            speaker), "recording" (clips of one recording in their original order) or "semantic"
            (clips with similar transcripts; see `data.semantic`).
        gap_seconds: range of the silence between two clips, drawn uniformly.
        distribution: distribution of the lengths: "uniform", or "log_uniform" (as many of 1 to 2
            minutes as of 7 to 14).
    """

    min_seconds: float
    max_seconds: float
    grouping: str = "random"
    gap_seconds: tuple[float, float] = (0.2, 0.6)
    distribution: str = "uniform"

    def __post_init__(self) -> None:
        if self.grouping not in GROUPINGS:
            raise UserError(f"grouping {self.grouping!r} is not one of {', '.join(GROUPINGS)}")
        if self.distribution not in DISTRIBUTIONS:
            raise UserError(
                f"distribution {self.distribution!r} is not one of {', '.join(DISTRIBUTIONS)}"
            )
        if not 0 < self.min_seconds <= self.max_seconds:
            raise UserError(
                f"min_seconds {self.min_seconds} and max_seconds {self.max_seconds} are not a "
                "range: 0 < min_seconds <= max_seconds is required"
            )
        if len(self.gap_seconds) != 2 or not 0 <= self.gap_seconds[0] <= self.gap_seconds[1]:
            raise UserError(
                f"gap_seconds {self.gap_seconds} is not a range: 0 <= first <= second is required"
            )

    def draw(self, rng: np.random.Generator) -> float:
        """Draws the length of a recording in seconds."""
        if self.distribution == "uniform":
            return rng.uniform(self.min_seconds, self.max_seconds)
        return float(np.exp(rng.uniform(np.log(self.min_seconds), np.log(self.max_seconds))))


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Clips of one source, each with the silence before it.

    Example: Example(source=0, clips=(4, 9), gaps=(0, 4800)) is clip 4, 0.3 s of silence, clip 9.

    Attributes:
        source: number of the source in the mixture.
        clips: positions in the source's index.
        gaps: samples of silence before each clip.
    """

    source: int
    clips: tuple[int, ...]
    gaps: tuple[int, ...] = (0,)


def single_examples(source: int, num_clips: int, rng: np.random.Generator) -> list[Example]:
    """Returns one example per clip, in random order."""
    return [Example(source, (clip,)) for clip in rng.permutation(num_clips).tolist()]


def _clip_runs(
    index: Sequence[Utterance],
    plan: LongForm,
    rng: np.random.Generator,
    vectors: scipy.sparse.csr_array | None,
) -> list[list[int]]:
    """Runs of clips that may be concatenated, in that order."""
    if plan.grouping == "random":
        return [rng.permutation(len(index)).tolist()]
    if plan.grouping == "semantic":
        if vectors is None:
            vectors = semantic.tf_idf([utterance.text for utterance in index])
        return [semantic.similarity_order(vectors, rng)]
    groups: dict[str, list[int]] = {}
    for clip, utterance in enumerate(index):
        name = utterance.speaker if plan.grouping == "speaker" else utterance.recording
        groups.setdefault(name, []).append(clip)
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
    fits: Callable[[int, int, int], bool] = lambda first, samples, tokens: True,
    vectors: scipy.sparse.csr_array | None = None,
) -> list[Example]:
    """Concatenates clips into recordings whose lengths follow the plan. Every clip is used once.

    A recording ends before the clip that would exceed its drawn length, or that would not fit in a
    row. The last recording of a run may be shorter.

    Args:
        source: number of the source in the mixture.
        index: the source's clips.
        plan: lengths, gaps and grouping.
        rng: source of all random choices.
        tokens: answer tokens of every clip, for `fits` (None: 0).
        fits: fits(first clip, samples, answer tokens): whether a recording fits in a row.
        vectors: `semantic.tf_idf` of the texts, for the semantic grouping (None: computed here).
    """
    examples = []
    for run in _clip_runs(index, plan, rng, vectors):
        clips, gaps, length, samples, count, target = [], [], 0.0, 0, 0, plan.draw(rng)
        for clip in run:
            gap = rng.uniform(*plan.gap_seconds) if clips else 0.0
            clip_tokens = 0 if tokens is None else tokens[clip]
            clip_seconds, clip_samples = index[clip].seconds, index[clip].num_samples
            joined_samples = samples + round(gap * SAMPLE_RATE) + clip_samples
            if clips and (
                length + gap + clip_seconds > target
                or not fits(clips[0], joined_samples, count + clip_tokens)
            ):
                examples.append(Example(source, tuple(clips), tuple(gaps)))
                clips, gaps, length, samples, count, gap = [], [], 0.0, 0, 0, 0.0
                target = plan.draw(rng)
            clips.append(clip)
            gaps.append(round(gap * SAMPLE_RATE))
            length = length + gap + clip_seconds
            samples += gaps[-1] + clip_samples
            count += clip_tokens
        if clips:
            examples.append(Example(source, tuple(clips), tuple(gaps)))
    return examples


def split(utterance: Utterance, fits: Callable[[Utterance], bool]) -> list[Utterance]:
    """Splits a transcribed recording at segment boundaries into the longest pieces that fit.

    Only transcripts can be split; a translation or a summary cannot.

    Example: three segments of 20 s each, where 45 s fit → pieces of 40 s and 20 s with the ids
    "{id}.1" and "{id}.2".

    Returns:
        The pieces, or an empty list if the recording cannot be split so that all pieces fit.

    Raises:
        UserError: the segments do not contain the whole transcript, so pieces would lose text.
    """
    if not utterance.segments or utterance.task != "asr" or utterance.answer != utterance.text:
        return []
    if lack_text(utterance.text, utterance.segments):
        raise UserError(
            f"{utterance.id}: does not fit in a row, and cannot be split: its segments do not "
            "contain the words of its text; correct them, or raise config.data.row"
        )
    pieces: list[Utterance] = []

    def make_piece(segments: Sequence[Segment]) -> Utterance:
        start, text = segments[0].start, " ".join(segment.text for segment in segments)
        return dataclasses.replace(
            utterance,
            offset=utterance.offset + start,
            seconds=segments[-1].end - start,
            answer=text,
            text=text,
            segments=tuple(Segment(s.start - start, s.end - start, s.text) for s in segments),
            id=f"{utterance.id}.{len(pieces) + 1}",
            has_offset=True,
            text_tokens=None,
            joined_tokens=None,
        )

    pending: list[Segment] = []
    for segment in utterance.segments:
        if pending and not fits(make_piece([*pending, segment])):
            pieces.append(make_piece(pending))
            pending = []
        pending.append(segment)
        if not fits(make_piece(pending)):
            return []
    return [*pieces, make_piece(pending)]
