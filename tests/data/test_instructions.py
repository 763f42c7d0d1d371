"""The default data to finetune on, and that no evaluation set is in it."""

import re

import pytest

from mptbook.data.benchmarks import BENCHMARKS, Question, load_benchmark
from mptbook.data.conversations import Conversation
from mptbook.data.instructions import MIXES, clean_mix, held_out, read_mix, without_overlap
from mptbook.data.overlap import Overlap
from mptbook.tokenizer.chat import check_turns

ASKED = "Which of the old lamps in the harbour was lit by a keeper who could not swim?"


def talk(text, answer="So."):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return Conversation(text, messages, text)


@pytest.fixture(scope="module")
def overlap():
    return Overlap({"lamps": [Question(1, ASKED)], "short": [Question(1, "Why do hares run?")]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ASKED, ("lamps", "exact")),
        (f"Read this.\n\n{ASKED.upper()}!", ("lamps", "exact")),
        (ASKED.replace("lamps", "lights"), None),  # 3 of its 12 runs are others
        (ASKED.replace("Which", "What"), ("lamps", "near")),
        (ASKED.replace(" swim", " dive"), ("lamps", "near")),
        ("Think.\nWhy do hares run?", ("short", "exact")),
        ("I wonder why do hares run so fast", None),
        ("A lamp in the harbour was lit", None),
        ("...", None),
    ],
)
def test_a_question_is_found_in_whatever_stands_around_it(overlap, text, expected):
    assert overlap.find([text]) == expected


def test_a_question_is_found_in_an_answer_too(overlap):
    kept, found = without_overlap([talk("So?", ASKED), talk("Why?")], overlap)
    assert [one.where for one in kept] == ["Why?"]
    assert found == {"So?": ("lamps", "exact")}


@pytest.fixture(scope="module", params=list(MIXES))
def mix(request):
    return request.param, *clean_mix(request.param)


def test_the_default_data_has_the_size_that_is_stated(mix):
    name, parts, overlaps = mix
    n = sum(map(len, parts.values()))
    assert n == {"instructions": 23_167, "conversations": 5_962}[name]
    assert n + overlaps.total() == sum(map(len, read_mix(name).values()))
    if name == "instructions":  # the file that is read has every question of the examination
        assert overlaps["boolq", "exact"] >= len(load_benchmark("boolq"))


def test_the_default_data_is_made_of_conversations(mix):
    _, parts, _ = mix
    for conversations in parts.values():
        assert len({one.where for one in conversations}) == len(conversations)
        for one in conversations:
            check_turns(one.messages)


def test_one_group_in_fifty_is_held_out_and_is_on_one_side(mix):
    _, parts, _ = mix
    everything = [one for of_part in parts.values() for one in of_part]
    sides = [{one.group for one in everything if held_out(one) == side} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) / sum(map(len, sides)) == pytest.approx(0.02, abs=0.006)


def test_no_question_of_boolq_is_asked_word_for_word():
    parts, overlaps = clean_mix("instructions")
    asked = {one.messages[0]["content"].rpartition(": ")[2] for one in parts["yes-or-no"]}
    assert not asked & {question.query for question in load_benchmark("boolq")}
    assert overlaps["boolq", "exact"] >= 3270 - 20


def test_no_question_of_any_set_stands_in_what_is_left(mix):
    _, parts, _ = mix
    texts = (m["content"] for of_part in parts.values() for one in of_part for m in one.messages)
    everything = " ".join(" ".join(re.findall(r"\w+", f"{text} | ".lower())) for text in texts)
    for name in BENCHMARKS:
        for question in load_benchmark(name)[::150]:
            words = re.findall(r"\w+", question.query.lower())
            assert len(words) < 5 or f" {' '.join(words)} " not in everything, (name, question)


def test_an_answer_of_quac_is_the_first_that_is_given():
    dialogues = read_mix("instructions")["dialogues"]
    assert dialogues[0].messages[0]["content"].endswith("\n\nwhat happened in 1983?")
    assert dialogues[0].messages[1]["content"] == "In May 1983, she married Nikos Karvelas."
    answers = [one.messages[1]["content"] for one in dialogues]
    assert not [answer for answer in answers if re.search("CANNOTANSWER", answer)]


def test_an_unknown_mix_is_refused():
    with pytest.raises(ValueError, match="poems is no default data; there are instructions, conv"):
        read_mix("poems")
