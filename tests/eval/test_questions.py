"""Where the questions of a task come from, and what becomes of bad rows."""

import json

import pytest

from mptbook.data.benchmarks import BENCHMARKS
from mptbook.eval.generated import GENERATED, OPERATIONS, load_generated
from mptbook.eval.questions import load_questions
from mptbook.eval.suite import SUITES, load_suite
from mptbook.eval.tasks import Choice, Completion, Generation, Schema, pose

GOOD = {
    Choice: {"query": "wet?", "choices": ["rain", "sun"], "gold": 0},
    Schema: {"context_options": ["The rain", "The sun"], "continuation": "is wet", "gold": 0},
    Completion: {"context": "rain is", "continuation": " wet"},
    Generation: {"context": "Is rain wet?", "answer": "yes", "aliases": ["it is"]},
}
BAD = [
    ({"query": "wet?", "choices": ["rain", "sun"]}, "gold is missing"),
    ({"query": "wet?", "choices": ["rain", "sun"], "gold": 2}, "gold is 2, of 2 options"),
    ({"query": "wet?", "choices": ["rain", "sun"], "gold": "0"}, "gold='0': input should be a"),
    ({"query": "wet?", "choices": ["rain"], "gold": 0}, r"choices=\['rain'\]: list should have"),
    ({"query": 3, "choices": ["rain", "sun"], "gold": 0}, "query=3: input should be a valid str"),
]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", GOOD)
def test_rows_of_each_type_are_read(tmp_path, kind):
    rows = [GOOD[kind], "", GOOD[kind] | {"category": "weather", "unknown": 1}]
    task = kind(data=write(tmp_path / "rows.jsonl", rows))
    questions, bad = load_questions(task)
    assert [(one.number, one.subject) for one in questions] == [(1, ""), (3, "weather")]
    assert not bad
    assert len(pose(task, questions)) == 2


@pytest.mark.parametrize(("row", "mistake"), [*BAD, ('{"query": "wet?"', "is not JSON")])
def test_a_bad_row_is_named_with_its_line_and_the_rest_goes_on(tmp_path, row, mistake):
    path = write(tmp_path / "rows.jsonl", [GOOD[Choice], row, GOOD[Choice]])
    questions, bad = load_questions(Choice(data=path), "skip")
    assert [one.number for one in questions] == [1, 3]
    assert len(bad) == 1
    with pytest.raises(ValueError, match=f"^{path}, line 2: {mistake}"):
        raise ValueError(bad[0])


@pytest.mark.parametrize(("row", "mistake"), BAD[:2])
def test_if_it_shall_a_bad_row_stops_everything(tmp_path, row, mistake):
    path = write(tmp_path / "rows.jsonl", [GOOD[Choice], row])
    with pytest.raises(ValueError, match=f"line 2: {mistake}.*; mend it, or take --on-bad skip"):
        load_questions(Choice(data=path), "stop")


def test_a_file_of_another_type_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD[Completion]] * 3)
    with pytest.raises(ValueError, match="no row for a task of type choice; 3 are bad"):
        load_questions(Choice(data=path))


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ("arc", ValueError, "arc is no evaluation set; there are boolq.*last-word.*jsonl"),
        ("none.jsonl", FileNotFoundError, "the task file none.jsonl does not exist"),
    ],
)
def test_a_set_that_does_not_exist_is_refused(data, kind, message):
    with pytest.raises(kind, match=message):
        load_questions(Choice(data=data))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_sets_are_the_same_every_time_and_have_no_question_twice(name):
    questions = load_generated(name)
    assert questions == load_generated(name)
    assert len(questions) > 100
    assert len({(one.context, one.query) for one in questions}) == len(questions)
    assert [one.number for one in questions] == list(range(1, len(questions) + 1))


def test_sums_are_right():
    for question in load_generated("arithmetic"):
        a, sign, b, equals = question.query.split()
        assert equals == "="
        assert question.answers == (str(OPERATIONS[sign](int(a), int(b))),)
        assert int(question.answers[0]) >= 0


def test_a_last_word_has_been_used_in_its_passage_before():
    for question in load_generated("last-word"):
        (word,) = question.answers
        assert word in question.query.lower()
        assert 35 <= len(question.query.split()) <= 150


def test_a_copy_is_the_line_before_without_its_first_word():
    for question in load_generated("copying"):
        line, first = question.query.split("\n")
        assert f"{first} {question.answers[0]}" == line


def test_the_number_that_is_asked_for_stands_once_in_the_list():
    for question in load_generated("retrieval"):
        name = question.query.split()[-2]
        (line,) = [one for one in question.context.splitlines() if name in one.split()]
        assert line.endswith(f" {question.options[question.gold]}.")


@pytest.mark.parametrize("suite", [path.stem for path in SUITES.glob("*.toml")])
def test_every_task_of_a_suite_has_questions_that_fit_it(suite):
    for task in load_suite(suite).tasks.values():
        questions, _ = load_questions(task)
        assert len(pose(task, questions, 3)) == 3
        assert task.category


def test_the_default_suite_has_all_sets_that_there_are():
    assert {task.data for task in load_suite("default").tasks.values()} == {*BENCHMARKS, *GENERATED}
