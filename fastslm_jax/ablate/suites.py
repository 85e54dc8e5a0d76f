"""The experiments as data: what each variant changes in the configs of the stages."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from fastslm_jax.errors import UserError

if TYPE_CHECKING:  # slow to import, and this module defines flags
    from fastslm_jax.models.fastslm import FastSLM

# {field: value, or function of the stage}. "*" stands for every source that joins clips.
Difference = Mapping[str, object]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """The config of a stage: as flags of train.py, and what they give.

    Attributes:
        name: "stage1" or "stage2".
        flags: --config=FILE, and the fields that are changed for all variants.
        following: the next stage, if the experiment has one.
    """

    name: str
    flags: tuple[str, ...]
    config: ConfigDict
    model: "FastSLM"
    following: "Stage | None" = None

    @property
    def seconds_per_step(self) -> float:
        """Audio of the rows of a step."""
        windows = self.config.global_batch_size * self.config.data.row.windows
        return windows * self.model.window.seconds

    def resolve(self, difference: Difference) -> dict[str, object]:
        """{field: value} of a difference, without fields that have this value anyway.

        Raises:
            UserError: the config has no such field.
        """
        changes = {}
        for pattern, value in difference.items():
            value = value(self) if callable(value) else value
            for field in self._fields(pattern):
                try:
                    current = operator.attrgetter(field)(self.config)
                except AttributeError:
                    raise UserError(f"{self.flags[0]}: has no field config.{field}") from None
                if current != value:
                    changes[field] = value
        return changes

    def _fields(self, pattern: str) -> list[str]:
        if "*" not in pattern:
            return [pattern]
        sources = self.config.data.train.items()
        joined = [pattern.replace("*", name) for name, source in sources if "join" in source]
        if not joined:
            raise UserError(f"{self.flags[0]}: no source of config.data.train joins clips")
        return joined


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant changes.

    Attributes:
        model: fields of every stage.
        stage1: fields of stage 1.
        stage2: fields of stage 2; None: there is no stage 2.
    """

    model: Difference = dataclasses.field(default_factory=dict)
    stage1: Difference = dataclasses.field(default_factory=dict)
    stage2: Difference | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """An experiment.

    Attributes:
        question: what it asks; the title of its table and picture.
        variants: by name.
        has_lengths: also scores the set `recordings`, each recording in one context.
    """

    question: str
    variants: Mapping[str, Variant]
    has_lengths: bool = False


def _tokens(per_30_seconds: int) -> Variant:
    """Rows get as many more token slots as they have speech tokens, so they hold equal data."""

    def size(stage: Stage) -> int:
        return max(1, round(per_30_seconds * stage.model.window.seconds / 30))

    def slots(stage: Stage) -> int:
        row = stage.config.data.row
        return row.tokens + row.windows * (size(stage) - stage.model.tokens_per_window)

    return Variant({"model.compression_size": size, "data.row.tokens": slots})


def _scales(count: int) -> Variant:
    """The queries of all scales together stay the same number."""
    return Variant(
        {"model.stage_tokens": lambda s: (sum(s.config.model.stage_tokens) // count,) * count}
    )


def _other_ratios(stage: Stage) -> tuple:
    """The learning rate ratios without those of detail recovery, for models that have none."""
    ratios = stage.config.optimizer.learning_rate_ratios
    return tuple(row for row in ratios if "detail_recovery" not in row[0])


_NO_RECOVERY = {"optimizer.learning_rate_ratios": _other_ratios}


def _recovery(layers: int) -> Difference:
    return {"model.detail_recovery_layers": layers, **({} if layers else _NO_RECOVERY)}


_WITH_AND_WITHOUT = {"": _recovery(2), ", no detail recovery": _recovery(0)}
_GROUPING = "data.train.*.join.grouping"


def _longer(stage1: Stage) -> int:
    """Steps of stage 1 that add as much audio as stage 2 has."""
    audio = stage1.following.config.steps * stage1.following.seconds_per_step
    return stage1.config.steps + round(audio / stage1.seconds_per_step)


SUITES = {
    "adapters": Suite(
        "Which adapter?",
        {
            "hfq": Variant({"model.adapter": "hfq"}),
            **{
                name: Variant({"model.adapter": name, **_NO_RECOVERY})
                for name in ("pooling", "stack", "wq_former", "sq_former")
            },
        },
    ),
    "tokens": Suite(
        "How many tokens per 30 s?", {str(count): _tokens(count) for count in (25, 50, 100, 200)}
    ),
    "recovery": Suite(
        "How many layers of detail recovery?",
        {str(layers): Variant(_recovery(layers)) for layers in (0, 1, 2)},
    ),
    "scales": Suite("How many scales?", {str(count): _scales(count) for count in (1, 2, 3, 4)}),
    "hfq": Suite(
        "Which details of the HFQ-Former matter?",
        {
            "as configured": Variant(),
            "downsampling by 3": Variant({"model.downsample_factor": 3}),
            "learned projections": Variant({"model.compressor_projections": True}),
            "random queries": Variant({"model.query_init": "normal"}),
        },
    ),
    "grouping": Suite(
        "Which clips should share a long recording?",
        {
            grouping + suffix: Variant(recovery, stage2={_GROUPING: grouping})
            for suffix, recovery in _WITH_AND_WITHOUT.items()
            for grouping in ("random", "recording", "speaker", "semantic")
        },
        has_lengths=True,
    ),
    "stages": Suite(
        "Is stage 2 needed?",
        {
            name + suffix: dataclasses.replace(variant, model=recovery)
            for suffix, recovery in _WITH_AND_WITHOUT.items()
            for name, variant in {
                "stage 1": Variant(),
                "longer stage 1": Variant(stage1={"steps": _longer}),
                "stages 1 and 2": Variant(stage2={_GROUPING: "random"}),
            }.items()
        },
        has_lengths=True,
    ),
}
