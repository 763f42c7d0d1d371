"""`mptbook bench optimizers`: time and memory of a step of Lion beside its peers.

On weights of the shapes of a named model and random gradients; no model is run.
"""

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mptbook.bench.measure import machine, medians, save, synchronize
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.lion import Lion
from mptbook.settings import RunSettings

ADAMW = "AdamW of PyTorch, fused"
COMPILED = "Lion, compiled"
LR, DECAY = 1e-4, 0.1


def random_weights(config: MPTConfig, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Parameters of the shapes of a model, with gradients."""
    with torch.device("meta"):
        shapes = [weight.shape for weight in MPT(config).parameters()]
    weights = [nn.Parameter(0.02 * torch.randn(s, dtype=dtype, device=device)) for s in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def optimizers(weights: list[nn.Parameter], low: list[nn.Parameter]) -> dict[str, object]:
    """Name to optimizer: those of float32 `weights`, then those of bfloat16, `low`."""
    try:
        import lion_pytorch
    except ImportError as error:
        raise ValueError(
            "lion-pytorch is compared and not here; pip install 'mptbook[bench]'"
        ) from error
    found = {
        ADAMW: torch.optim.AdamW(weights, lr=LR, weight_decay=DECAY, fused=True),
        "lion-pytorch": lion_pytorch.Lion(weights, lr=LR, weight_decay=DECAY),
        "Lion": Lion(weights, lr=LR, weight_decay=DECAY),
    }
    if compiler_found(weights[0].device.type):
        found[COMPILED] = Lion(weights, lr=torch.tensor(LR), weight_decay=DECAY)
    for rounding in ("nearest", "stochastic", "master"):
        name = f"Lion, bfloat16, {rounding}"
        found[name] = Lion(low, lr=LR, weight_decay=DECAY, rounding=rounding)
    return found


def compiler_found(device: str) -> bool:
    """Whether `torch.compile` can make kernels here."""
    if device == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return importlib.util.find_spec("triton") is not None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what an optimizer remembers."""
    states = optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def compare(model: str = "mpt-125m", repeats: int = 7) -> dict:
    """Seconds of a step and bytes of state for each of `optimizers`.

    Args:
        model: a named size; its weights in float32 and in bfloat16, gradients and the state
            of all optimizers are held at once.
        repeats: rounds; the median is taken.

    Returns:
        What `book/_data/optimizers.json` holds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = MPTConfig.named(model)
    weights, low = (random_weights(config, d, device) for d in (torch.float32, torch.bfloat16))
    made = optimizers(weights, low)
    steps: dict[str, Callable[[], object]] = {name: one.step for name, one in made.items()}
    start, compile_seconds = time.perf_counter(), None
    if COMPILED in made:
        steps[COMPILED] = torch.compile(made[COMPILED].step)
        steps[COMPILED]()
        synchronize()
        compile_seconds = time.perf_counter() - start
    return {
        "model": model,
        "device": device,
        "parameters": sum(weight.numel() for weight in weights),
        "seconds": medians(steps, repeats),
        "state_bytes": {name: state_bytes(one) for name, one in made.items()},
        "compile_seconds": compile_seconds,
    }


class BenchOptimizers(RunSettings):
    """A step of Lion beside its peers: `mptbook bench optimizers`."""

    model: str = Field("mpt-125m", description="named size whose shapes the weights have")
    repeats: PositiveInt = Field(7, description="rounds; the median is taken")
    out: Path | None = Field(None, description="where to write the figures as JSON")

    def run(self) -> None:
        results = {"machine": machine()} | compare(self.model, self.repeats)
        n = results["parameters"]
        print(f"{n:,} weights on {results['device']}, {torch.get_num_threads()} threads")
        print(f"{'a step':28} {'ms':>8}  {'times AdamW':>11}  {'state, bytes a weight':>22}")
        for name, seconds in results["seconds"].items():
            times = seconds / results["seconds"][ADAMW]
            state = results["state_bytes"][name] / n
            print(f"{name:28} {seconds * 1e3:8.1f}  {times:11.2f}  {state:22.2f}")
        if results["compile_seconds"] is not None:
            print(f"compiled in {results['compile_seconds']:.0f} s, at the first step")
        if self.out is not None:
            save(results, self.out)
            print(f"written to {self.out}")
