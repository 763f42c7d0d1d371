"""The preference set: what is paired with what, and rows of one's own."""

import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from mptbook import wheels
from mptbook.data import preferences
from mptbook.data.conversations import Mistakes
from mptbook.data.preferences import (
    Pair,
    as_pair,
    default_pairs,
    longer_chosen,
    rated_conversations,
    read_pairs,
)

ASKED = [{"role": "user", "content": "Why?"}]
ROW = {"prompt": "Why?", "chosen": "Because it rains.", "rejected": "No."}
PAIR = Pair(tuple(ASKED), "Because it rains.", "No.")


def block(who, *texts):
    return [{"text": text, "timestamp": "", "sender": who} for text in texts]


def conversation(prompt, marks, *messages):
    ratings = dict(zip(preferences.MARKS, marks, strict=True))
    return {"prompt": prompt, "ratings": ratings, "start": "", "messages": list(messages)}


@pytest.fixture
def conversations(monkeypatch):
    """Puts conversations in the place of the wheel's, all of them for training."""
    held = {}
    monkeypatch.setattr(wheels, "read", lambda *_: json.dumps(held).encode())
    monkeypatch.setattr(preferences.zlib, "crc32", lambda _: 1)
    rated_conversations.cache_clear()
    yield held
    rated_conversations.cache_clear()


def talk(marks, first, second="", prompt="Pigs?"):
    second = second or "no"  # too short to be an answer
    return conversation(prompt, marks, block("a", *first.split(" / ")), block("b", second))


def test_the_answer_of_the_conversation_with_the_higher_score_is_chosen(conversations):
    conversations["1"] = talk(("4", 4, 4), "one two three four")
    conversations["2"] = talk((9, "8", 10), "one two / three five")
    (pair,) = default_pairs("train")
    assert pair == Pair(
        ({"role": "user", "content": "Pigs?"},), "one two three five", "one two three four"
    )


def test_marks_that_nobody_gave_are_no_judgment(conversations):
    conversations["1"] = talk((5, 5, 5), "one two three four")
    conversations["2"] = talk((9, 9, 9), "one two three five")
    del (unrated := talk((9, 9, 9), "one two three six"))["ratings"]
    conversations["3"] = unrated
    assert [one.name for one in rated_conversations()] == ["2"]


def test_a_conversation_that_nobody_answered_is_left_out(conversations):
    conversations["1"] = conversation("Pigs?", (9, 9, 9), block("a", "hello"), block("a", "hi"))
    assert rated_conversations() == ()


def test_only_answers_to_the_same_topic_with_scores_far_apart_are_paired(conversations):
    conversations["1"] = talk((4, 4, 4), "one two three four")
    conversations["2"] = talk((9, 9, 9), "one two three five", prompt="Cows?")
    conversations["3"] = talk((5, 5, 6), "one two three nine")
    assert default_pairs("train") == []


def test_a_speaker_is_paired_with_the_one_in_the_same_place(conversations):
    conversations["1"] = talk((4, 4, 4), "one two three four", "five six seven eight")
    conversations["2"] = talk((9, 9, 9), "one two three nine", "five six seven zero")
    chosen = [pair.chosen for pair in default_pairs("train")]
    assert chosen == ["one two three nine", "five six seven zero"]


def test_an_answer_is_what_a_speaker_wrote_in_three_turns(conversations):
    turns = [block(who, f"{who} {n}") for n in range(4) for who in "ab"]
    conversations["1"] = conversation("Pigs?", (9, 9, 9), *turns)
    assert rated_conversations()[0].said(1) == "b 0\nb 1\nb 2"


def test_matched_answers_differ_in_length_by_a_fifth_at_most(conversations):
    conversations["1"] = talk((4, 4, 4), "one two three four " * 2)
    conversations["2"] = talk((9, 9, 9), "one two three five")
    assert default_pairs("train") == []
    assert len(default_pairs("train", matched=False)) == 1


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_matching_leaves_length_with_nothing_to_tell(split):
    """In the real set; without it the longer is chosen more often, by more than chance."""

    def surplus(pairs):  # in standard errors of a fair coin
        return (longer_chosen(pairs) - 0.5) * 2 * math.sqrt(len(pairs))

    assert abs(surplus(default_pairs(split))) < 2.5
    assert surplus(default_pairs(split, matched=False)) > 2.5


def test_no_text_is_on_both_sides_and_none_is_used_twice():
    def texts(split):
        return [
            (p.prompt[0]["content"], t)
            for p in default_pairs(split)
            for t in (p.chosen, p.rejected)
        ]

    train, heldout = texts("train"), texts("heldout")
    assert len(heldout) > 600
    assert len(train) > 1600
    assert len({*train}) > 0.99 * len(train)  # some write the same as another did
    assert len({*train} & {*heldout}) <= 2


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'test'; it must be train or heldout"):
        default_pairs("test")


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "prompt": ASKED},
        {**ROW, "chosen": [{"role": "assistant", "content": "Because it rains."}]},
        {
            "chosen": [*ASKED, {"role": "assistant", "content": "Because it rains."}],
            "rejected": [*ASKED, {"role": "assistant", "content": "No."}],
        },
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because it rains.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
        },
    ],
)
def test_text_and_messages_with_or_without_a_prompt_are_the_same_pair(row):
    assert as_pair(row) == PAIR


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"chosen": None}, "it has no chosen"),
        ({"rejected": ROW["chosen"]}, "chosen and rejected are the same"),
        ({"chosen": " "}, "turn 2 is an empty response"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "turn 1 has the unknown role 'robot'"),
        ({"prompt": [*ASKED, *ASKED]}, "turn 2 is of the user, where the assistant should speak"),
        ({"chosen": 7}, "chosen is neither text nor a list of messages"),
        ({"chosen": [*ASKED, *ASKED]}, "chosen has 2 turns; it should be one answer"),
        ({"prompt": ""}, "it has no prompt, and chosen and rejected share no conversation"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(change, what):
    with pytest.raises(ValueError, match=what):
        as_pair({**ROW, **change})


def test_a_bad_row_is_named_by_its_line(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROW) + '\n\n{"prompt": "a"}\n[1]\n{broken\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 3: it has no chosen; .*--on-bad skip"):
        read_pairs(file, Mistakes("stop"))
    mistakes = Mistakes("skip")
    assert read_pairs(file, mistakes) == [PAIR]
    named = " ".join(mistakes.lines())
    assert all(f"line {n}: " in named for n in (3, 4, 5))
    assert "it is not JSON" in named


def test_parquet_files_of_a_folder_are_read(tmp_path):
    rows = [{**ROW, "prompt": ASKED}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (pair,) = read_pairs(tmp_path, Mistakes())
    assert pair == PAIR
    assert pair.where == f"{tmp_path / 'a.parquet'}, row 1"


def test_a_source_without_a_pair_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"has no pairs; .*a.jsonl, line 1: it has no chosen"):
        read_pairs(tmp_path / "a.jsonl", Mistakes("skip"))
