"""Results of a suite: kept in a JSON file as they come, shown as a table, drawn as a figure."""

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mptbook.eval.reader import Reader
from mptbook.eval.tasks import Task

VERSIONS = "mptbook", "torch", "transformers", "tokenizers"
WEIGHTS = "*.safetensors", "*.bin", "*.gguf"
ABOUT = "config.json", "tokenizer.json", "tokenizer_config.json"


def model_digest(path: str | Path, reader: Reader) -> str:
    """What a result belongs to: the files of a model, or its revision on the hub."""
    place = Path(reader.model.config._name_or_path or str(path))
    if Path(path).suffix == ".gguf":
        files = [Path(path)]
    elif place.is_dir():
        files = [place / name for name in ABOUT if (place / name).exists()]
        files += [file for pattern in WEIGHTS for file in sorted(place.glob(pattern))]
    else:
        return f"{path}@{getattr(reader.model.config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def task_key(task: Task, **settings: object) -> str:
    """Equal for two runs of a task that must find the same."""
    told = [task.model_dump(mode="json"), settings]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    if Path(task.data).suffix == ".jsonl" and Path(task.data).exists():
        digest.update(Path(task.data).read_bytes())
    return digest.hexdigest()


class Results:
    """The results of one model; written after every task, so that a run can go on.

    Args:
        path: a JSON file; None keeps them in memory. One that exists is gone on with.
        about: what identifies the model: its ``digest``, and what else is worth knowing.

    Raises:
        ValueError: if the file is not one of results, or belongs to another model.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object]) -> None:
        self.path = path
        self.tasks: dict[str, dict] = {}
        self.about = dict(about)
        if path is not None and path.exists():
            self.tasks = _earlier(path, str(about["digest"]))

    def found(self, name: str, key: str) -> bool:
        """Whether a task needs no other run."""
        return self.tasks.get(name, {}).get("key") == key

    def add(self, name: str, key: str, found: dict) -> None:
        self.tasks[name] = {"key": key} | found

    def as_json(self, categories: Mapping[str, float]) -> dict:
        return {
            "model": self.about,
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in VERSIONS},
            "categories": dict(categories),
            "tasks": self.tasks,
        }

    def write(self, categories: Mapping[str, float]) -> None:
        """The file, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.as_json(categories), ensure_ascii=False) + "\n")
        partial.replace(self.path)


def _earlier(path: Path, digest: str) -> dict[str, dict]:
    try:
        kept = json.loads(path.read_text())
        earlier, tasks = kept["model"]["digest"], dict(kept["tasks"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no results of a suite; give another file") from None
    if earlier != digest:
        raise ValueError(
            f"{path} holds results of another model ({kept['model'].get('path')}); "
            "give another file, or delete this one"
        )
    return tasks


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(tasks: Mapping[str, dict], categories: Mapping[str, float]) -> Table:
    """Tasks with accuracy, standard error and chance, and then the categories."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("task", "n", "shots", "accuracy", "error", "chance", "above", "ECE", "by"):
        side = "left" if column in ("task", "by") else "right"
        shown.add_column(column, justify=side, no_wrap=True)
    for name, found in tasks.items():
        task, error = found["task"], found["error"]
        off = found.get("calibration")
        shown.add_row(
            name,
            f"{found['n']:,}",
            str(task["shots"]),
            f"{found['accuracy']:.3f}",
            "" if error is None else f"{error:.3f}",
            f"{found['chance']:.3f}",
            f"{found['above']:+.3f}",
            "" if off is None else f"{off:.3f}",
            task.get("normalise") or task.get("grade") or task["type"],
        )
    shown.add_section()
    for name, above in categories.items():
        shown.add_row(name, *[""] * 5, f"{above:+.3f}", "", "")
    return shown


def draw(results: Mapping[str, Mapping[str, dict]], path: Path | None = None):
    """Bars of accuracy with two standard errors, a thick line where a guess would be.

    Args:
        results: for each model, its tasks.
        path: where to write the figure; its suffix says how.

    Returns:
        The figure of matplotlib.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "figures are drawn with matplotlib, which is not here; pip install 'mptbook[book]'"
        ) from None
    names = list(dict.fromkeys(name for tasks in results.values() for name in tasks))
    figure = Figure(figsize=(6.8, 1.2 + 0.22 * len(names) * len(results)), layout="constrained")
    ax = figure.subplots()
    height = 0.8 / len(results)
    for place, (model, tasks) in enumerate(results.items()):
        rows = [names.index(name) + height * (place - (len(results) - 1) / 2) for name in tasks]
        accuracies = [found["accuracy"] for found in tasks.values()]
        errors = [2 * (found["error"] or 0) for found in tasks.values()]
        chances = [found["chance"] for found in tasks.values()]
        ax.barh(rows, accuracies, height, xerr=errors, label=model, error_kw={"lw": 0.8})
        lower, upper = [row - height / 2 for row in rows], [row + height / 2 for row in rows]
        ax.vlines(chances, lower, upper, color="black", lw=2)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("accuracy, with two standard errors; thick: what a guess gets")
    ax.spines[["top", "right"]].set_visible(False)
    if len(results) > 1:
        ax.legend(frameon=False, fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure
