"""The optimizer of a run and its learning rate, as settings."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

from mptbook.model.mpt import MPT
from mptbook.optim.groups import decay_groups
from mptbook.optim.lion import Lion
from mptbook.optim.schedule import schedule

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(BaseModel):
    """The optimizer and its learning rate."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["lion", "adamw"] = "lion"
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="decay of the momentum(s)")
    weight_decay: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="of matrices, times lr, per step"
    )
    embedding_lr: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of embeddings, times lr"
    )
    vector_lr: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of norms' weights and biases, times lr"
    )
    decoupled: bool = Field(
        False, description="decay times lr over its peak, as llm-foundry's Lion: try 1e-4"
    )
    schedule: Literal["cosine", "linear", "inverse_sqrt", "trapezoid"] = "cosine"
    warmup: NonNegativeInt = Field(100, description="steps of linear rise")
    floor: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    decay: float = Field(0.4, gt=0, le=1, description="part of a trapezoid that falls")
    clip: PositiveFloat = Field(1.0, description="largest norm of the gradient; inf: any")

    def rates(self, steps: int) -> Callable[[int], float]:
        """The learning rate as a function of the step, for a run of so many."""
        return schedule(
            self.schedule,
            self.lr,
            steps=steps,
            warmup=self.warmup,
            floor=self.floor,
            decay=self.decay,
        )


def make_optimizer(model: MPT, optim: Optim) -> torch.optim.Optimizer:
    """Lion or AdamW over the model's weights; only matrices decay.

    Raises:
        ValueError: if AdamW is asked for decoupled decay.
    """
    groups = decay_groups(model, optim.weight_decay, optim.embedding_lr, optim.vector_lr)
    for group in groups:  # `decoupled` measures a rate against the first that it sees
        group["lr"] = optim.lr * group.get("lr_factor", 1.0)
    if optim.name == "lion":
        return Lion(groups, lr=optim.lr, betas=optim.betas, decoupled=optim.decoupled)
    if optim.decoupled:
        raise ValueError("optim.decoupled is a setting of Lion; take optim.name='lion', or drop it")
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
