"""The package reads left to right: a room may import only from rooms before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mptbook"
ORDER = """settings world wheels tokenizer data model weights directory fsdp hf infer eval optim
    train finetune export serve plan bench __main__""".split()


def rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            within = node.module == "mptbook"  # `from mptbook import wheels`
            names = (
                [f"mptbook.{alias.name}" for alias in node.names] if within else [node.module or ""]
            )
        for name in names:
            if name.startswith("mptbook."):
                yield name.split(".")[1]


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("import mptbook.model.mpt", "model"),
        ("from mptbook.data.loader import Rows", "data"),
        ("from mptbook import wheels", "wheels"),
    ],
)
def test_every_way_to_import_a_room_is_seen(tmp_path, line, room):
    (tmp_path / "a.py").write_text(f"import torch\n\ndef f():\n    {line}\n")
    assert list(rooms_imported(tmp_path / "a.py")) == [room]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_backwards_and_files_stay_short(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room != "__init__":
        unknown = {room, *rooms_imported(path)} - set(ORDER)
        assert not unknown, f"{path.name} is of or imports {unknown}, which ORDER does not have"
        late = [r for r in rooms_imported(path) if ORDER.index(r) > ORDER.index(room)]
        assert not late, f"{room} imports from {late}, which come after it in ORDER"
    assert path.read_text().count("\n") <= 300


def test_the_model_can_be_read_in_one_sitting():
    open_files, seen = [ROOT / "model" / "mpt.py"], set()
    while open_files:
        path = open_files.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mptbook."):
                open_files.append(ROOT.joinpath(*node.module.split(".")[1:]).with_suffix(".py"))
    assert sum(path.read_text().count("\n") for path in seen) <= 1100, sorted(seen)
