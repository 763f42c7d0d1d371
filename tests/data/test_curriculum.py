import pytest

from mptbook.data.curriculum import Curriculum, Stage

MPT_30B = [  # with rows a hundredth as many
    Stage(tokens=1_000_000, row_tokens=20, batch_tokens=1000, mixture={"code": 1, "text": 9}),
    Stage(tokens=50_000, row_tokens=80, batch_tokens=400, mixture={"code": 2.5, "text": 7.5}),
]


def test_stages_follow_one_another_by_their_tokens():
    curriculum = Curriculum(MPT_30B)
    assert (curriculum.steps, curriculum.starts) == (1000 + 125, [0, 1000])
    parts = [(stage.row_tokens, first, end) for _, stage, first, end in curriculum.parts(0)]
    assert parts == [(20, 0, 1000), (80, 1000, 1125)]


def test_what_a_stage_leaves_open_is_as_in_the_stage_before():
    later = Stage(tokens=2000, row_tokens=40), Stage(tokens=1000, lr=0.5), Stage(tokens=1000)
    first, second, third, fourth = Curriculum([MPT_30B[0], *later]).stages
    assert (second.batch_tokens, second.mixture) == (1000, first.mixture)
    assert (third.row_tokens, third.lr, fourth.lr) == (40, 0.5, 1.0)


def test_an_empty_mixture_ends_that_of_the_stage_before():
    assert Curriculum([MPT_30B[0], Stage(tokens=1000, mixture={})]).stages[1].mixture == {}


@pytest.mark.parametrize("start", [0, 1, 999, 1000, 1124])
def test_the_parts_after_any_step_are_those_that_are_left(start):
    parts = list(Curriculum(MPT_30B).parts(start))
    taken = [(max(start, first), end, number) for number, _, first, end in parts]
    assert taken[0][0] == start
    assert taken[-1][1] == 1125
    assert [number for *_, number in taken] == ([0, 1] if start < 1000 else [1])
    assert list(Curriculum(MPT_30B).parts(1125)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1500}, "stage 2: 1500 tokens are no whole steps of 1000; take 1000"),
        ({"batch_tokens": 30}, "stage 2: batch_tokens=30 is not a multiple of the 20 .* take 20"),
        ({"row_tokens": 3000}, "batch_tokens=1000 is not a multiple of the 3000"),
    ],
)
def test_durations_that_do_not_add_up_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Curriculum([MPT_30B[0], Stage(**({"tokens": 1000} | changes))])


def test_a_stage_with_a_bad_mixture_or_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="the weight of code is -1"):
        Stage(tokens=1000, mixture={"code": -1})
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Stage(tokens=1000, row_token=1)


def test_a_first_stage_must_say_everything():
    with pytest.raises(ValueError, match="stage 1 does not say its row_tokens"):
        Curriculum([Stage(tokens=1000, batch_tokens=10)])
    with pytest.raises(ValueError, match="at least one stage"):
        Curriculum([])
