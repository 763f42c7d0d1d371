"""`mptbook bench fsdp`: what each of 1, 2 and 4 processes holds of one model that all train.

The processes are real and run on the CPU, with a thread each. Each number of them trains the same
model on the same rows.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import Field, PositiveInt

from mptbook.bench.measure import Bench
from mptbook.model.config import MPTConfig
from mptbook.plan.costs import parameters
from mptbook.settings import Ended

BYTES = ("weights", "gradients", "momentum", "build_bytes", "resident_bytes", "peak_bytes")


class Failed(Ended):
    """A process of a bench did not come to its end."""

    code = 1


class BenchFSDP(Bench):
    """What each process holds of a sharded model: `mptbook bench fsdp`."""

    processes: list[PositiveInt] = Field([1, 2, 4], min_length=1, description="numbers of them")
    d_model: PositiveInt = Field(512, description="width of the model")
    n_layers: PositiveInt = Field(16, description="its blocks")
    n_heads: PositiveInt = Field(8, description="heads of a block")
    vocab_size: PositiveInt = Field(1024, description="ids")
    row_tokens: PositiveInt = Field(16, description="tokens of a row")
    rows: PositiveInt = Field(4, description="rows of a step, over all processes")
    steps: PositiveInt = Field(3, description="that are timed; three go before them")

    def compare(self) -> dict:
        """``processes``: for each number of them the figures of `together`."""
        config = MPTConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            vocab_size=self.vocab_size,
            max_seq_len=self.row_tokens,
        )
        for n in self.processes:
            if self.rows % n:
                raise ValueError(
                    f"rows={self.rows} of a step do not divide over {n} processes; take "
                    f"{n * -(-self.rows // n)}"
                )
        n_parameters, found = parameters(config)["total"], {}
        print(f"{n_parameters:,} parameters, {self.rows} rows of {self.row_tokens} tokens a step")
        print(f"{'':9}  MB of a process")
        print(
            f"{'processes':>9} {'weights':>8} {'gradients':>9} {'momentum':>8} {'resident':>8} "
            f"{'peak':>6} {'s a step':>8}  last loss"
        )
        for n in self.processes:
            found[str(n)] = one = together(run_processes(n, config, self.rows, self.steps))
            weights, gradients, momentum, _, resident, peak = (one[name] / 1e6 for name in BYTES)
            print(
                f"{n:9} {weights:8.1f} {gradients:9.1f} {momentum:8.1f} {resident:8.1f} "
                f"{peak:6.1f} {one['median_seconds']:8.3f}  {one['losses'][-1]:.5f}",
                flush=True,
            )
        settings = self.model_dump(mode="json", exclude={"out"})
        return {"settings": settings, "parameters": n_parameters, "processes": found}


def run_processes(n: int, config: MPTConfig, rows: int, steps: int) -> list[dict]:
    """What each of `n` processes found that trained one model; see `sharded.measured`.

    Raises:
        Failed: if one of them ends with an error; with all that they said.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(n), "-m", "mptbook.bench.sharded"]
    told = json.dumps({"config": config.to_hf(), "rows": rows, "steps": steps})
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        words = [*launcher, told, folder]
        done = subprocess.run(words, capture_output=True, text=True, env=one_thread)
        if done.returncode:
            raise Failed(
                f"{n} processes ended with exit code {done.returncode}; they said:\n"
                f"{done.stdout}{done.stderr}"
            )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n)]


def together(reports: list[dict]) -> dict:
    """Of bytes the largest over the processes, of each step the seconds of the slowest.

    Losses are those of all processes; that they agree on them is asserted.
    """
    losses, *others = (report["losses"] for report in reports)
    assert all(other == losses for other in others), "processes disagree about the loss"
    seconds = [max(step) for step in zip(*(report["seconds"] for report in reports), strict=True)]
    return {
        **{name: max(report[name] for report in reports) for name in BYTES},
        "losses": losses,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
    }
