"""A run as it was after a step: copied in memory, written to files, read from them.

A process alone writes a model directory and beside it

    optimizer.safetensors   the optimizer's state by the name of the weight, and the random state
    state.json              the step, the guard's state, what the run was made with

Several processes write, each for itself, the parts that they hold:

    shard-00002-model-00001-of-00002.safetensors    weights of the second process
    shard-00002-model-00002-of-00002.safetensors    its optimizer and random state

torch.distributed.checkpoint puts together what any number of processes needs out of either.
Nothing in them is a pickle.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mptbook import world
from mptbook.directory import fresh_directory, read_config, write_about
from mptbook.fsdp import resharded
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.chat import ChatTemplate
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import trained_weights, write_tensors, write_weights

FORMAT = 3
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Snapshot:
    """What training is about to change, in memory of its own; of each tensor the own part."""

    step: int
    config: MPTConfig
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]  # of the optimizer, and random states
    tokenizer: Tokenizer
    state: dict

    @classmethod
    def take(
        cls,
        step: int,
        model: MPT,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        guard: Mapping,
        made_with: Mapping,
    ) -> Self:
        """Copy a run.

        Args:
            guard: `Guard.state_dict()`.
            made_with: what must be equal at a resume, as JSON has it.
        """
        resharded(model)
        trained = trained_weights(model)
        weights = {name: _copy(weight) for name, weight in trained.items()}
        tensors = {
            f"{name}:{key}": _copy(value)
            for name, weight in trained.items()
            for key, value in optimizer.state[weight].items()
        }
        state = {
            "format": FORMAT,
            "step": step,
            "processes": world.size(),
            "guard": guard,
            "made_with": made_with,
        }
        return cls(step, model.config, weights, tensors | _random_states(), tokenizer, state)

    def write(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Write the files into an empty folder.

        Args:
            group: of all processes, for nothing else at the time; None for a process alone.

        Raises:
            OSError: in every process, if one of them cannot write.
        """
        if group is None:
            write_weights(self.weights, folder, SHARD_BYTES, lambda names: _these(self, names))
            write_tensors(self.tensors, folder / "optimizer.safetensors")
        else:
            self._write_parts(folder, group)
        world.from_first(lambda: self._write_about(folder), group)

    def _write_about(self, folder: Path) -> None:
        write_about(folder, self.config, torch.float32, self.tokenizer)
        (folder / "state.json").write_text(json.dumps(self.state, indent=1) + "\n")

    def _write_parts(self, folder: Path, group: dist.ProcessGroup) -> None:
        files = dict.fromkeys(self.weights, 1) | dict.fromkeys(self.tensors, 2)
        for other in range(world.size()):  # each process plans for all
            files |= dict.fromkeys(_random_names(other), 2)
        writer = dcp.HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=files, save_distributed=True
        )
        try:
            dcp.save(self.weights | self.tensors, storage_writer=writer, process_group=group)
        except dcp.CheckpointException as error:
            of_process, (reason, _) = next(iter(error.failures.items()))
            raise OSError(f"process {of_process} could not write its part: {reason}") from error


def load_snapshot(
    path: Path, model: MPT, optimizer: torch.optim.Optimizer, made_with: Mapping
) -> dict:
    """Restore weights, optimizer and random state in place, of as many processes as are here.

    Args:
        made_with: as for `Snapshot.take`.

    Returns:
        The state: ``step`` and ``guard`` among others.

    Raises:
        ValueError: if the files are of another format, of a model of another shape, or were
            made with something else; model and optimizer are as they were.
    """
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {state['format']}, this version of mptbook reads format {FORMAT}; "
            "resume with the version that wrote it"
        )
    saved = read_config(path)
    if saved != model.config:
        raise ValueError(
            f"{path} holds a model of another shape ({_difference(saved, model.config)}); "
            "resume with the settings in run.toml"
        )
    for name, value in made_with.items():
        then = state["made_with"].get(name)
        if then != value:
            raise ValueError(
                f"{path} was made with {name}={str(then)[:12]} and not {str(value)[:12]}; resume "
                "with the settings in run.toml, or choose another --out"
            )
    there = _stored(path)
    resharded(model)
    weights = trained_weights(model)
    states = {
        name: _room(stored, weights[name.rpartition(":")[0]])
        for name, stored in there.items()
        if name.rpartition(":")[0] in weights
    }
    random = {
        name: torch.empty(there[name].size, dtype=torch.uint8)
        for name in _random_names(world.rank())
        if name in there
    }
    _load({name: weight.detach() for name, weight in weights.items()} | states | random, path)
    for name, weight in weights.items():
        prefix = f"{name}:"
        optimizer.state[weight] = {
            key.removeprefix(prefix): value
            for key, value in states.items()
            if key.startswith(prefix)
        }
    _restore_random_states(random)
    return state


def consolidate(
    path: Path, out: Path, max_shard_bytes: int = SHARD_BYTES, template: ChatTemplate | None = None
) -> None:
    """Make a model directory of a checkpoint, holding no more than one of its files in memory.

    Args:
        path: a checkpoint of any number of processes.
        out: the model directory; one that is there is replaced.
        max_shard_bytes: the weights are split into files of at most this size.
        template: how the model was taught to read conversations.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if `out` holds something else, or the checkpoint adapters alone.
    """
    if not (path / "state.json").is_file():
        raise FileNotFoundError(f"{path} is no checkpoint; give a step-... folder of a run")
    if json.loads((path / "state.json").read_text())["made_with"].get("lora", {}).get("rank"):
        raise ValueError(f"{path} has adapters only, which the run's own model/ holds at its end")
    config = read_config(path)
    with torch.device("meta"):
        described = MPT(config).state_dict()

    def fetch(names: list[str]) -> dict[str, Tensor]:
        values = {name: torch.empty(described[name].shape) for name in names}
        _load(values, path, alone=True)
        return values

    with fresh_directory(out) as fresh:
        write_weights(described, fresh, max_shard_bytes, fetch)
        write_about(fresh, config, torch.float32, Tokenizer.load(path), template)


def _these(snapshot: Snapshot, names: list[str]) -> dict[str, Tensor]:
    return {name: snapshot.weights[name] for name in names}


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """What the files hold, by name: size and dtype."""
    return dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata


def _load(tensors: dict[str, Tensor], path: Path, alone: bool = False) -> None:
    """Fill tensors with what files hold under their names; of a DTensor the own part."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
        dcp.load(tensors, storage_reader=reader, no_dist=alone or world.size() == 1)


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU; of a DTensor the own part, as a DTensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        _copy(tensor.to_local()),
        _on_cpu(tensor.device_mesh),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@lru_cache
def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """The same processes, talking about memory of the CPU."""
    if mesh.device_type == "cpu":
        return mesh
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)


def _room(stored: TensorStorageMetadata, weight: Tensor) -> Tensor:
    """Memory for a state of a weight; it lives where the weight does, AdamW's counter does not."""
    dtype = stored.properties.dtype
    if stored.size == weight.shape:
        return torch.zeros_like(weight, dtype=dtype, requires_grad=False)
    return torch.zeros(stored.size, dtype=dtype)


def _random_names(rank: int) -> list[str]:
    """Of the generators of a process: the CPU's, and that of its GPU."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [f"random:{rank}:{kind}" for kind in kinds]


def _random_states() -> dict[str, Tensor]:
    cpu, *cuda = _random_names(world.rank())
    return {cpu: torch.get_rng_state()} | {name: torch.cuda.get_rng_state() for name in cuda}


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        restore = torch.cuda.set_rng_state if name.endswith("cuda") else torch.set_rng_state
        restore(state)


def _difference(a: MPTConfig, b: MPTConfig) -> str:
    return ", ".join(
        f"{name} {getattr(a, name)} and not {getattr(b, name)}"
        for name in vars(a)
        if getattr(a, name) != getattr(b, name)
    )
