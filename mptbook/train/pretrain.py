"""A whole pretraining run, from prepared rows to a model directory: `mptbook pretrain`."""

import tomllib
from pathlib import Path
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from mptbook.data.curriculum import Stage
from mptbook.train.course import Training, train
from mptbook.train.run import Run


class Pretrain(Training):
    """Train a model, from scratch or on from given weights: `mptbook pretrain`."""

    verb: ClassVar[str] = "pretrain"

    data: Path = Field(description="folder that mptbook prepare wrote")
    model: str = Field("mpt-tiny", description="a named size; its vocabulary must fit the data")
    weights: str | None = Field(
        None, description="start from those of a model directory, run or hub name, not afresh"
    )
    shape: dict[str, bool | int | float | str] = Field(
        {}, description="fields of MPTConfig that differ, e.g. --shape n_layers=2"
    )
    steps: PositiveInt = Field(4800, description="optimizer steps")
    mixture: dict[str, NonNegativeFloat] = Field(
        {}, description="weight of each domain, e.g. --mixture code=0.3; none: all rows alike"
    )
    repeat: bool = Field(True, description="false: a domain that runs dry is an error")
    stages: list[Stage] = Field(
        [], description="tokens, rows, batch and mixture of each; none: one of all steps"
    )
    heldout_characters: PositiveInt = Field(
        65_536, description="of each domain for these; once more on all of it at the end"
    )
    sample_prompt: str = Field("The", description="continued whenever held out is measured")

    @field_validator("shape")
    @classmethod
    def _typed(cls, shape: dict) -> dict:
        if part := shape.keys() & {"attn_config", "init_config"}:
            raise ValueError(f"give the fields of {part.pop()} by their own names")
        return {key: _value(text) if isinstance(text, str) else text for key, text in shape.items()}

    def train(self) -> Path:
        return pretrain(self)


def _value(text: str) -> bool | int | float | str:
    """What a flag's text means in TOML: a number, true or false; else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def pretrain(settings: Pretrain) -> Path:
    """Train, log and save; see `mptbook.train.course.train`.

    Raises:
        ValueError: if settings, data and checkpoint do not fit together.
    """
    return train(settings, Run.make(settings))
