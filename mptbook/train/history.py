"""What happened to a run, read out of its log: `mptbook history`."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from mptbook.settings import RunSettings
from mptbook.train.log import read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUIET = ("heldout", "sample", "saved", "final")  # kinds of lines that decide nothing


class History(RunSettings):
    """Tell what happened to a run, and draw it: `mptbook history`."""

    directory: CliPositionalArg[Path] = Field(description="run directory")
    plot: Path | None = Field(None, description="picture to write; its ending says which kind")

    def run(self) -> None:
        for line in decisions(self.directory):
            print(told(line))
        if self.plot is not None:
            plot_history(self.directory).savefig(self.plot, dpi=150)


def decisions(run: str | Path) -> list[dict]:
    """The lines of the log at which a run left its straight way, in the order of time.

    Starts and resumes, refused steps, rollbacks, damaged or unsaved checkpoints, signals.
    """
    history = read_history(run)
    return [
        line
        for line in history
        if line["kind"] not in QUIET and (line["kind"] != "step" or line["refused"])
    ]


def told(line: dict) -> str:
    """One line of `decisions` in words."""
    what = {
        "started": lambda: "resumed" if line["resumed"] else "started",
        "step": lambda: f"not taken: {line['refused']}",
        "rollback": lambda: (
            f"back to step {line['to']:,}, leaving out {len(line['skipped'])} batches: "
            f"{line['reason']}"
        ),
        "damaged": lambda: f"passed over {line['path']}: {line['what']}",
        "unsaved": lambda: f"no checkpoint: {line['error']}",
        "stopped": lambda: f"stopped by {line['by']}",
    }[line["kind"]]()
    return f"step {line['step']:,}  {what}"


def plot_history(run: str | Path) -> "Figure":
    """Loss and gradient norm over time, with every decision marked.

    The horizontal axis counts the steps that were computed, those among them that a resume or
    a rollback undid; what was undone is pale. Refused steps are crosses, rollbacks red lines,
    resumes green ones, damaged or unsaved checkpoints orange ones.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    history = read_history(run)
    steps = [line for line in history if line["kind"] == "step"]
    counted = range(1, len(steps) + 1)
    final = {line["step"]: n for n, line in enumerate(steps)}
    for axes, name, what in (
        (above, "loss", "nats per token"),
        (below, "grad_norm", "norm of the gradient"),
    ):
        values = [float("nan") if line[name] is None else line[name] for line in steps]
        kept = [v if final[steps[n]["step"]] == n else float("nan") for n, v in enumerate(values)]
        axes.plot(counted, values, color="C0", alpha=0.3, lw=0.7)
        axes.plot(counted, kept, color="C0", lw=0.7)
        axes.set(ylabel=what, yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    _mark_decisions(above, below, history)
    below.set_xlabel("steps computed")
    return figure


def _mark_decisions(above: "Axes", below: "Axes", history: list[dict]) -> None:
    colours = {"rollback": "C3", "started": "C2", "damaged": "C1", "unsaved": "C1"}
    computed = 0
    for line in history:
        computed += line["kind"] == "step"
        if line["kind"] in colours and computed > 0:
            for axes in (above, below):
                axes.axvline(computed, color=colours[line["kind"]], lw=0.8, ls="--")
        if line["kind"] == "step" and line["refused"] and line["loss"] is not None:
            above.plot(computed, line["loss"], "x", color="C3")
