import json

import datasets
import pytest

from mptbook.data.conversations import Mistakes, read_conversations, to_messages

WHY, SO = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [WHY, SO]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"prompt": "Why?", "response": "So."},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"question": "Why?", "human_answers": ["x"], "chatgpt_answers": ["So.", "Or so."]},
        {"message_1": "Why?", "message_2": "So.", "topic;": "logic"},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?"},
        {"text": "### Human: Why?### Assistant: So."},
        {
            "prompt": "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nWhy?\n\n### Response:\n",
            "response": "So.",
        },
    ],
)
def test_every_shape_of_a_row_gives_the_same_turns(row):
    assert to_messages(row) == [WHY, SO]


def test_what_a_prompt_is_about_follows_it():
    row = {"instruction": "Summarise.", "input": "A hare ran.", "output": "So."}
    assert to_messages(row)[0]["content"] == "Summarise.\n\nA hare ran."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "it is a list, not an object"),
        ({"note": "so"}, "no turns: it has note, and neither"),
        ({}, "no turns: it has nothing, and neither"),
        ({"prompt": 3, "response": "So."}, "a prompt or response is a int, not a text"),
        ({"text": "A hare ran."}, "no turns: it has text"),
    ],
)
def test_a_row_of_no_known_shape_is_refused(row, said):
    with pytest.raises(ValueError, match=said):
        to_messages(row)


@pytest.fixture
def rows():
    return [{"prompt": f"Why {n}?", "response": "So.", "kind": str(n % 2)} for n in range(5)]


def test_a_table_and_lines_hold_the_same_conversations(rows, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    found = {
        name: [(one.messages, one.group) for one in read_conversations(str(place), Mistakes())]
        for name, place in (("a", tmp_path / "a.jsonl"), ("b", tmp_path / "b.parquet"))
    }
    assert found["a"] == found["b"]
    assert [group for _, group in found["a"]] == [row["prompt"] for row in rows]
    wanted = read_conversations(f"{tmp_path / 'a.jsonl'}#kind=1", Mistakes())
    assert [one.where for one in wanted] == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (2, 4)]


def test_a_dataset_of_the_hub_is_read_row_by_row(rows, monkeypatch):
    from mptbook.data import conversations

    def given(place, stream):
        assert (place, stream) == ("hf:mosaicml/dolly_hhrlhf", True)
        return iter(rows)

    monkeypatch.setattr(conversations, "open_hub", given)
    found = list(read_conversations("hf:mosaicml/dolly_hhrlhf", Mistakes()))
    assert found[2].where == "hf:mosaicml/dolly_hhrlhf, row 3"
    assert found[2].messages == [{"role": "user", "content": "Why 2?"}, SO]


def test_mistakes_are_counted_by_what_is_wrong_and_the_first_are_named():
    mistakes = Mistakes("skip")
    for number in range(30):
        mistakes.note(f"line {number}", f"turn {number} is an empty response")
    mistakes.note("line 99", ValueError("no turns"))
    assert dict(mistakes.counts) == {"turn N is an empty response": 30, "no turns": 1}
    assert len(mistakes.named["turn N is an empty response"]) == Mistakes.NAMED
    assert mistakes.lines() == [
        "left out 30 rows, the first of them line 0: turn 0 is an empty response",
        "left out 1 row, the first of them line 99: no turns",
    ]
    with pytest.raises(ValueError, match="line 3: no turns; mend it, or leave such rows out"):
        Mistakes().note("line 3", "no turns")


def test_plain_text_and_what_is_not_there_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("A hare ran.")
    with pytest.raises(ValueError, match=r"a.txt is plain text; conversations are in .jsonl"):
        list(read_conversations(str(tmp_path / "a.txt"), Mistakes()))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_conversations(str(tmp_path / "b.jsonl"), Mistakes()))


def test_a_role_that_is_no_text_is_a_bad_row(tmp_path):
    rows = [{"messages": [WHY, SO]}, {"messages": [{"role": ["user"], "content": "Why?"}, SO]}]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mistakes = Mistakes("skip")
    assert len(list(read_conversations(str(tmp_path / "talks.jsonl"), mistakes))) == 1
    assert "line 2" in " ".join(mistakes.lines())
