"""How a question is put, and what counts as right."""

import pytest
from pydantic import ValidationError

from mptbook.data.benchmarks import Question
from mptbook.eval.tasks import Choice, Completion, Generation, Schema, grade, normalised, pose

QUESTIONS = [
    Question(n, f"what is {n}?", context=f"It is {n}.", options=(f"no {n}", f"yes {n}"), gold=n % 2)
    for n in range(1, 10)
]
WRITTEN = [Question(n, f"{n} + 1 =", answers=(str(n + 1), "more")) for n in range(1, 10)]


def test_a_question_without_examples_is_its_prompt_and_each_option():
    task = Choice(data="x", prompt="{context}\nQuestion: {query}\nAnswer:")
    posed = pose(task, QUESTIONS)[3]
    assert posed.pairs == (
        ("It is 4.\nQuestion: what is 4?\nAnswer:", " no 4"),
        ("It is 4.\nQuestion: what is 4?\nAnswer:", " yes 4"),
    )
    assert posed.options == ("no 4", "yes 4")
    assert posed.chance == 0.5


def test_options_can_be_shown_and_asked_for_by_letter():
    task = Choice(data="x", prompt="{query}\n{options}\nAnswer:", answer="letter")
    posed = pose(task, QUESTIONS)[0]
    assert posed.pairs[1] == ("what is 1?\nA. no 1\nB. yes 1\nAnswer:", " B")


def test_examples_are_answered_rightly_and_stand_before_the_question():
    task = Choice(data="x", shots=2, instruction="Choose.\n", between="\n", delimiter=" -> ")
    posed = pose(task, QUESTIONS)
    assert len(posed) == 7  # those that are shown are not asked
    prompt = posed[0].pairs[0][0]
    first, *examples, asked = prompt.splitlines()
    assert first == "Choose."
    assert asked == posed[0].question.query
    assert len(examples) == 2
    for line in examples:
        query, _, answer = line.partition(" -> ")
        (question,) = [q for q in QUESTIONS if q.query == query]
        assert answer == question.options[question.gold]
        assert question not in [one.question for one in posed]


def test_drawn_once_all_questions_share_their_examples():
    begins = {
        one.pairs[0][0].rpartition("\n\n")[0] for one in pose(Choice(data="x", shots=3), QUESTIONS)
    }
    assert len(begins) == 1


def test_drawn_for_each_a_question_is_never_its_own_example():
    task = Choice(data="x", shots=5, draw="each")
    posed = pose(task, QUESTIONS)
    assert [one.question for one in posed] == QUESTIONS
    begins = set()
    for one in posed:
        begin, _, query = one.pairs[0][0].rpartition("\n\n")
        assert query not in begin
        begins.add(begin)
    assert len(begins) > 5


@pytest.mark.parametrize("draw", ["once", "each"])
def test_the_same_seed_puts_the_same_questions(draw):
    task = Choice(data="x", shots=2, draw=draw)
    assert pose(task, QUESTIONS, 4) == pose(task, QUESTIONS, 4)
    other = task.model_copy(update={"seed": 5})
    assert pose(other, QUESTIONS, 4) != pose(task, QUESTIONS, 4)


def test_with_examples_for_each_a_part_is_put_as_the_whole():
    task = Choice(data="x", shots=2, draw="each")
    whole = {one.question.number: one for one in pose(task, QUESTIONS)}
    for one in pose(task, QUESTIONS, 4):
        assert one == whole[one.question.number]


def test_a_schema_has_a_prompt_for_each_option_and_one_continuation():
    questions = [Question(n, "", options=("the cat", "the dog"), gold=0, answers=("ate",))
                 for n in (1, 2)]  # fmt: skip
    posed = pose(Schema(data="x", prompt="So {query}", shots=1), questions)
    (one,) = posed
    assert [pair[0].rpartition("\n\n") for pair in one.pairs] == [
        ("So the cat ate", "\n\n", "So the cat"),
        ("So the cat ate", "\n\n", "So the dog"),
    ]
    assert {pair[1] for pair in one.pairs} == {" ate"}
    assert one.chance == 0.5


def test_completions_and_generations_are_put_with_their_first_answer():
    for task in (Completion(data="x"), Generation(data="x")):
        one = pose(task, WRITTEN)[0]
        assert one.pairs == (("1 + 1 =", " 2"),)
        assert one.chance == 0


def test_the_options_alone_stand_after_what_the_setting_says():
    task = Choice(data="x", normalise="unconditional", alone="Answer:")
    assert pose(task, QUESTIONS)[0].alone == (("Answer:", " no 1"), ("Answer:", " yes 1"))


@pytest.mark.parametrize(
    ("task", "questions", "message"),
    [
        (Choice(data="x"), WRITTEN, "question 1 of x has no options"),
        (Completion(data="x"), QUESTIONS, "question 1 of x has no answers"),
        (Choice(data="x", shots=9), QUESTIONS, "x has 9 questions, too few for 9 examples"),
    ],
)
def test_questions_that_do_not_fit_their_task_are_refused(task, questions, message):
    with pytest.raises(ValueError, match=message):
        pose(task, questions)


@pytest.mark.parametrize("change", [{"promt": "a"}, {"prompt": "{passage}"}, {"shots": -1}])
def test_a_setting_that_a_task_cannot_have_is_refused(change):
    with pytest.raises(ValidationError):
        Choice(data="x", **change)


def test_conventions_by_hand():
    nats, tokens, options = [-6.0, -7.0, -3.0], [3, 7, 1], ["größe", "a long one", "yes"]
    assert normalised(nats, tokens, options, "none") == nats
    assert normalised(nats, tokens, options, "tokens") == [-2, -1, -3]
    assert normalised(nats, tokens, options, "characters") == [-6 / 5, -0.7, -1]
    assert normalised(nats, tokens, options, "bytes") == [-6 / 7, -0.7, -1]
    assert normalised(nats, tokens, options, "unconditional", [-7, -7, -2]) == [1, 0, -1]


@pytest.mark.parametrize(
    ("how", "text", "answers", "score"),
    [
        ("exact", " The Nile.", ["Amazon", "nile"], 1),
        ("exact", " Nile river", ["nile"], 0),
        ("contains", " It is the Nile river", ["nile"], 1),
        ("contains", " juvenile", ["nile"], 0),
        ("f1", " the long Nile", ["The Nile"], 2 / 3),
        ("f1", " no", ["The Nile"], 0),
        ("number", " 1,200 apples, not 3", ["1200 apples"], 1),
        ("number", " 12", ["1200 apples"], 0),
        ("number", " Yes", ["yes"], 1),  # an answer that is no number is compared as a word
        ("number", " none", ["3"], 0),
    ],
)
def test_grades_by_hand(how, text, answers, score):
    assert grade(Generation(data="x", grade=how), text, answers) == pytest.approx(score)


def test_what_stands_before_the_answer_of_a_derivation_does_not_count():
    task = Generation(data="x", after="The answer is", grade="number")
    assert grade(task, " 3 and 4 make 7. The answer is 7", ["7"]) == 1
    assert grade(Generation(data="x", grade="number"), " 3 and 4 make 7", ["7"]) == 0
