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

QUIET = ("stage", "heldout", "sample", "saved", "final")  # kinds of lines that decide nothing


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
        if line["kind"] not in QUIET and (line["kind"] != "step" or line.get("refused"))
    ]


def told(line: dict) -> str:
    """One line of `decisions` in words."""
    what = {
        "started": lambda: "resumed" if line["resumed"] else "started",
        "gathered": lambda: (
            f"{sum(line['conversations'].values()):,} conversations to learn from; left out "
            f"{sum(kind['rows'] for kind in line['left_out']):,} bad rows, and "
            f"{sum(n for *_, n in line['overlaps']):,} that evaluation sets ask"
        ),
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

    The horizontal axis counts the steps that were computed. Those that a resume or a rollback
    undid are among them, on a grey ground. Refused steps are crosses; triangles at the upper
    edge, where what was computed is not finite.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    history = read_history(run)
    steps = [line for line in history if line["kind"] == "step"]
    for axes, name, what in zip(
        panels, ("loss", "grad_norm"), ("nats per token", "norm of the gradient"), strict=True
    ):
        _draw_steps(axes, name, steps)
        _mark_decisions(axes, history)
        _look(axes)
        axes.set_ylabel(what)
    panels[1].set_xlabel("steps computed")
    labelled = {}
    for axes in panels:
        labelled |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if labelled:
        figure.legend(
            labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, frameon=False
        )
    return figure


def _draw_steps(axes: "Axes", name: str, steps: list[dict]) -> None:
    """The values of taken steps as a line, those of refused ones as marks."""
    nan = float("nan")
    values = [nan if line[name] is None or line["refused"] else line[name] for line in steps]
    axes.plot(range(1, len(steps) + 1), values, color="C0", lw=1)
    refused = {n: line[name] for n, line in enumerate(steps, 1) if line["refused"]}
    finite = {n: value for n, value in refused.items() if value is not None}
    if finite:
        axes.plot(finite.keys(), finite.values(), "x", color="C3", ms=5, label="refused")
    others = sorted(refused.keys() - finite.keys())
    if others:
        edge = axes.get_xaxis_transform()  # x in steps, y from 0 below to 1 above
        how = {"color": "C3", "ms": 4, "transform": edge, "label": "refused, not finite"}
        axes.plot(others, [0.97] * len(others), "^", **how)


def _mark_decisions(axes: "Axes", history: list[dict]) -> None:
    """Lines where the run went back, was resumed or had trouble with a checkpoint."""
    marks = {
        "rollback": ("C3", "went back"),
        "started": ("C2", "resumed"),
        "damaged": ("C1", "checkpoint damaged or unsaved"),
        "unsaved": ("C1", "checkpoint damaged or unsaved"),
    }
    computed, at = 0, {0: 0}  # of each step, how many had been computed when it was taken
    for line in history:
        kind = line["kind"]
        if kind == "step":
            computed += 1
            at[line["step"]] = computed
        elif kind in marks and computed > 0:
            colour, label = marks[kind]
            axes.axvline(computed + 0.5, color=colour, lw=1, ls="--", label=label)
        if kind in ("rollback", "started") and computed > 0:
            kept = at[line["to"] if kind == "rollback" else line["step"]]
            if kept < computed:
                ground = {"color": "0.88", "lw": 0, "zorder": 0, "label": "undone"}
                axes.axvspan(kept + 0.5, computed + 0.5, **ground)


def _look(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1, 2, 5) if high / low > 5 else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
