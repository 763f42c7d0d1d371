"""A training in stages: how long its rows are, what they are of, and for how many tokens.

MPT-30B read a trillion tokens in rows of 2,048, then 50 billion in rows of 8,192 with more code
among them. Attention costs the square of a row's length; ALiBi lets a model that has learned on
short rows go on with long ones.
"""

from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from mptbook.data.mixture import Mixture


class Stage(BaseModel):
    """A part of a training. What is None is as in the stage before, at first as in the run."""

    model_config = ConfigDict(extra="forbid")

    tokens: PositiveInt = Field(description="to train on; a multiple of batch_tokens")
    row_tokens: PositiveInt | None = Field(
        None, description="tokens of a row, a multiple of those of a prepared row"
    )
    batch_tokens: PositiveInt | None = Field(None, description="tokens per step")
    mixture: dict[str, float] | None = Field(
        None, description="weight of each domain; {} takes all rows alike"
    )
    lr: PositiveFloat = Field(1.0, description="times the schedule's learning rate")

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        if self.mixture:
            Mixture(self.mixture)
        return self


class Curriculum:
    """Stages, one after the other.

    Args:
        stages: at least one; the first says everything but its mixture.

    Attributes:
        stages: with nothing left open.
        starts: steps taken before each.
        steps: of all together.

    Raises:
        ValueError: if the tokens of a stage are no whole steps, or those of a step no whole
            rows.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("a curriculum needs at least one stage")
        self.stages: list[Stage] = []
        self.starts: list[int] = []
        self.steps = 0
        before = Stage(tokens=1, mixture={})
        for number, stage in enumerate(stages, start=1):
            said = stage.model_dump(exclude_none=True)
            before = Stage(**(before.model_dump(exclude={"lr"}) | said))
            _whole(number, before)
            self.stages.append(before)
            self.starts.append(self.steps)
            self.steps += before.tokens // before.batch_tokens

    def parts(self, start: int) -> Iterator[tuple[int, Stage, int, int]]:
        """What is left after `start` steps: number and stage, its first step and the one after
        its last."""
        ends = [*self.starts[1:], self.steps]
        for number, (stage, first, end) in enumerate(
            zip(self.stages, self.starts, ends, strict=True)
        ):
            if start < end:
                yield number, stage, first, end


def _whole(number: int, stage: Stage) -> None:
    for name in ("row_tokens", "batch_tokens"):
        if getattr(stage, name) is None:
            raise ValueError(f"stage {number} does not say its {name}")
    if stage.batch_tokens % stage.row_tokens:
        below = max(stage.row_tokens, stage.batch_tokens - stage.batch_tokens % stage.row_tokens)
        raise ValueError(
            f"stage {number}: batch_tokens={stage.batch_tokens} is not a multiple of the "
            f"{stage.row_tokens} tokens of a row; take {below}"
        )
    if stage.tokens % stage.batch_tokens:
        below = max(stage.batch_tokens, stage.tokens - stage.tokens % stage.batch_tokens)
        raise ValueError(
            f"stage {number}: {stage.tokens} tokens are no whole steps of "
            f"{stage.batch_tokens}; take {below}"
        )
