import json

import pytest

from mptbook.bench import finetune as bench
from mptbook.bench.finetune import BenchFinetune


@pytest.fixture
def small(monkeypatch, chosen):
    """Recipes that train in no time."""

    def recipe(file, out, **how):
        return chosen(out, loss_on="all" if "chat" in file.stem else "last", **how)

    monkeypatch.setattr(bench.Finetune, "from_toml", recipe)


def test_a_model_is_measured_before_and_after_it_has_learned(small, base, tmp_path, capsys):
    out = tmp_path / "finetune.json"
    how = {"home": tmp_path / "runs", "model": str(base), "answers": 2, "new_tokens": 3}
    BenchFinetune(out=out, **how).run()
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["instruct", "adapters", "chat"]
    for name, one in runs.items():
        assert one["after"]["all"]["loss"] < one["before"]["all"]["loss"], name
        assert 0 <= one["after"]["all"]["ended"] <= 1
        assert len(one["after"]["parts"]["talk"]["answers"]) == 2
        assert one["steps"] == 6
    alike = runs["instruct"]["before"]["all"], runs["adapters"]["before"]["all"]
    assert alike[0] == alike[1]
    assert runs["adapters"]["memory"]["optimizer"] < runs["instruct"]["memory"]["optimizer"]
    # What is trained already is only measured again.
    trained = (tmp_path / "runs/chat/model/model.safetensors").stat().st_mtime_ns
    BenchFinetune(out=out, **how).run()
    assert (tmp_path / "runs/chat/model/model.safetensors").stat().st_mtime_ns == trained
    assert json.loads(out.read_text())["runs"] == runs
