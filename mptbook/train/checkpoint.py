"""Checkpoints of a run: everything that the next step depends on, in `step-000480/`.

Each is a model directory with two files more: `optimizer.safetensors` and `state.json`. It is
written under another name and renamed when it is whole, so a killed run never leaves half of
one under its final name.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mptbook.directory import load_model, save_model
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer

NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    run: Path,
    step: int,
    model: MPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    keep: int = 2,
) -> Path:
    """Write `run/step-...`, then remove all but the newest `keep` checkpoints."""
    final = run / f"step-{step:06d}"
    partial = run / f"partial-{step:06d}"
    for killed in run.glob("*partial-*"):  # what earlier processes left, `save_model` included
        shutil.rmtree(killed)
    save_model(model, partial, tokenizer)
    tensors = _optimizer_tensors(model, optimizer) | {"rng": torch.get_rng_state()}
    save_file(tensors, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"format": 1, "step": step}) + "\n")
    if final.exists():  # resumed from this very step: its bits are the same
        shutil.rmtree(final)
    partial.rename(final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def load_checkpoint(path: Path, model: MPT, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights, optimizer and random state in place; returns the steps taken.

    Raises:
        ValueError: if the checkpoint is of another format or of a model of another shape.
    """
    state = json.loads((path / "state.json").read_text())
    if state["format"] != 1:
        raise ValueError(f"{path} has format {state['format']}; this version reads format 1")
    saved = load_model(path)
    if saved.config != model.config:
        raise ValueError(
            f"{path} holds a model of another shape ({_difference(saved.config, model.config)}); "
            "resume with the settings in run.toml"
        )
    model.load_state_dict(saved.state_dict())
    tensors = load_file(path / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    for name, weight in model.named_parameters():
        prefix = f"{name}:"
        optimizer.state[weight] = {
            key.removeprefix(prefix): value.clone()
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
    return state["step"]


def _optimizer_tensors(model: MPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the name of the weight: `transformer.wte.weight:momentum`."""
    return {
        f"{name}:{key}": value.contiguous()
        for name, weight in model.named_parameters()
        for key, value in optimizer.state[weight].items()
    }


def _difference(a, b) -> str:
    return ", ".join(
        f"{name} {getattr(a, name)} and not {getattr(b, name)}"
        for name in vars(a)
        if getattr(a, name) != getattr(b, name)
    )
