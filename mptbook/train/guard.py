"""Steps that must not be taken, and when the run has to go back to a checkpoint.

A gradient that is not finite ruins the weights, or with Lion kills momentum where nobody looks.
A loss far out of line comes from a damaged batch or from weights that have begun to diverge.
Neither step is taken. Several in a row mean that the weights are to blame: the run goes back
to a checkpoint from before, and leaves out the batches that led there.

Source: Chowdhery et al., "PaLM", arXiv:2204.02311, section 5.1 (going back, and leaving batches
out).
"""

import math
from collections import deque

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from mptbook import world
from mptbook.data.loader import place
from mptbook.settings import Ended

# Of the mean, or of one nat where the mean is less: a loss that hardly moves is not judged on
# its last digits.
SMALLEST_SPREAD = 0.01


class GuardSettings(BaseModel):
    """Which steps are refused, and how often the run may go back."""

    model_config = ConfigDict(extra="forbid")

    window: PositiveInt = Field(100, ge=2, description="steps taken whose losses are the measure")
    threshold: float = Field(
        6.0, gt=0, description="standard deviations above their mean that refuse a loss; inf: none"
    )
    patience: PositiveInt = Field(4, description="refused steps in a row before going back")
    lead: NonNegativeInt = Field(
        10, description="steps before the refused ones that are held suspect with them"
    )
    rollbacks: NonNegativeInt = Field(3, description="times that the run may go back")


class Guard:
    """Judges each step before it is taken.

    Args:
        settings: None refuses only what is not finite, and never asks to go back.

    Attributes:
        refused: steps refused in a row, up to now.
        skipped: places in the order of the batches that are left out, ascending.
        rollbacks: times that the run went back.
    """

    def __init__(self, settings: GuardSettings | None = None) -> None:
        self.settings = settings
        self.refused = 0
        self.rollbacks = 0
        self.skipped: list[int] = []
        self._losses: deque[float] = deque(maxlen=settings.window if settings else 0)

    def judge(self, loss: float, grad_norm: float, device: str | torch.device = "cpu") -> str:
        """Why a step must not be taken; "" where it may.

        Processes that train together agree: what one refuses, all refuse.

        Args:
            loss: nats per target token.
            grad_norm: of all gradients together, before clipping.
            device: where the processes exchange a number.
        """
        reason = self._reason(loss, grad_norm)
        if world.total([bool(reason)], device) != [0] and not reason:
            reason = "another process refused it"
        if reason:
            self.refused += 1
        else:
            self.refused = 0
            self._losses.append(loss)
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the norm of the gradient is {grad_norm}"
        deviations = self.deviations(loss)
        if self.settings is not None and deviations > self.settings.threshold:
            mean = np.mean(self._losses)
            return f"the loss {loss:.3f} is {deviations:.1f} standard deviations above {mean:.3f}"
        return ""

    def deviations(self, loss: float) -> float:
        """How far a loss lies above those of the last steps taken, in standard deviations.

        0.0 until `window` steps are taken, and without settings.
        """
        if self.settings is None or len(self._losses) < self.settings.window:
            return 0.0
        mean = float(np.mean(self._losses))
        spread = max(float(np.std(self._losses)), SMALLEST_SPREAD * max(mean, 1.0))
        return (loss - mean) / spread

    @property
    def must_go_back(self) -> bool:
        return self.settings is not None and self.refused >= self.settings.patience

    def first_suspect(self, step: int) -> int:
        """The first step of those that led to the refusal of `step`, counted from 1."""
        assert self.settings is not None
        return max(1, step - self.refused + 1 - self.settings.lead)

    def go_back(self, step: int) -> list[int]:
        """Leave out the batches of the suspect steps up to `step`; their places in the order.

        Raises:
            Diverged: if the run went back as often as it may.
        """
        assert self.settings is not None
        first = self.first_suspect(step)
        if self.rollbacks == self.settings.rollbacks:
            raise Diverged(
                f"step {step:,}: steps refused in a row: {self.refused}, after going back "
                f"{self.rollbacks} times; log.jsonl has the reasons. Take a lower optim.lr or a "
                f"longer optim.warmup, look at the batches of steps {first:,} to {step:,}, or "
                "allow more with guard.rollbacks, and resume"
            )
        places = [place(s - 1, self.skipped) for s in range(first, step + 1)]
        self.skipped = sorted(self.skipped + places)
        self.rollbacks += 1
        return places

    def forget(self) -> None:
        """Begin to gather losses anew."""
        self._losses.clear()

    def state_dict(self) -> dict:
        """What a checkpoint keeps, as JSON has it."""
        return {
            "refused": self.refused,
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict) -> None:
        self.refused = state["refused"]
        self.rollbacks = state["rollbacks"]
        self.skipped = list(state["skipped"])
        self._losses.clear()
        self._losses.extend(state["losses"])


class Diverged(Ended):
    """The run went back as often as it may, and diverged again."""

    code = 3
