"""Preferences: a prompt with two answers, one of which people liked better.

The default set is made of the wheel chitchat-dataset: people wrote to each other in pairs about
a given topic, and afterwards a conversation got three marks from 1 to 10. The mean of the three
is its score. The prompt of a pair is a topic; the answers are what one speaker wrote in their
first three turns in each of two conversations about it, and chosen is the one of the conversation
with the higher score.

So a score was given to a whole conversation, by one rater whom the data does not name, and not
to one answer beside another. What made it high or low may lie in what the other one said, or
came later. Who writes matters more than what is written: people with many conversations have
scores of their own, and they are on both sides of the split. Whole conversations are no answers
and are not compared; the longer of two has the higher score in three cases of four.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mptbook import wheels
from mptbook.data.conversations import Mistakes, read_rows, spoken
from mptbook.data.corpora import SPLITS
from mptbook.tokenizer.chat import check_turns

Message = dict[str, str]  # {"role": ..., "content": ...}

SOURCE, LICENCE = "BYU's chitchat, wheel chitchat-dataset", "MIT"
MARKS = ("witty", "interesting", "upbeat")
UNTOUCHED = (5.0, 5.0, 5.0)  # half of all marks: where the sliders stood
TURNS = 3  # of a speaker; the first is often no more than a greeting
LEAST_WORDS, MOST_CHARACTERS = 4, 1000  # of what a speaker wrote in them
HELD_OUT = 3  # one conversation in
GAP = 2.0  # least difference of two scores
MATCHED = 1.2  # most that the longer answer has of the shorter's characters


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        prompt: turns, the last of them the user's.
        chosen, rejected: what the assistant says to it; the first was liked better.
        where: the pair was found.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Rated:
    """A conversation of two people, with the marks that it got."""

    name: str
    topic: str
    score: float  # mean of `MARKS`, 1 to 10
    turns: tuple[tuple[str, str], ...]  # who wrote, and what

    def said(self, speaker: int) -> str:
        """What the first (0) or second (1) to write wrote in their first `TURNS` turns."""
        first = self.turns[0][0]
        texts = [text for who, text in self.turns if (who == first) == (speaker == 0)]
        return "\n".join(texts[:TURNS])


@cache
def rated_conversations() -> tuple[Rated, ...]:
    """The conversations of two people whose marks somebody gave, by name.

    Left out are those whose three marks are all 5, and those in which nobody answered.
    """
    found = []
    everything = json.loads(wheels.read("chitchat-dataset", "chitchat_dataset/dataset.json"))
    for name, one in sorted(everything.items()):
        marks = tuple(float(one["ratings"][mark]) for mark in MARKS) if "ratings" in one else None
        if marks is None or marks == UNTOUCHED or not one.get("prompt"):
            continue
        turns = tuple(
            (block[0]["sender"], " ".join(message["text"].strip() for message in block))
            for block in one["messages"]
        )
        if len({who for who, _ in turns}) == 2:
            found.append(Rated(name, one["prompt"], sum(marks) / len(marks), turns))
    return tuple(found)


def default_pairs(split: str, *, matched: bool = True, gap: float = GAP) -> list[Pair]:
    """The pairs of the default set.

    Conversations are split first, by their names, and paired then: none is on both sides. Each
    gives at most one pair for each of its speakers.

    Args:
        split: `train` or `heldout`.
        matched: only pair answers of like length, so that it cannot tell which is chosen.
        gap: least difference of the two scores.

    Raises:
        ValueError: if the split is unknown.
        ConnectionError: if the wheel cannot be fetched.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be train or heldout")
    unpaired: dict[tuple[str, int], list[tuple[float, str]]] = {}
    found = []
    for one in rated_conversations():
        if (zlib.crc32(one.name.encode()) % HELD_OUT == 0) != (split == "heldout"):
            continue
        for speaker in (0, 1):
            said = one.said(speaker)
            if len(said.split()) < LEAST_WORDS or len(said) > MOST_CHARACTERS:
                continue
            waiting = unpaired.setdefault((one.topic, speaker), [])
            other = _partner(waiting, one.score, said, gap, matched)
            if other is None:
                waiting.append((one.score, said))
                continue
            waiting.remove(other)
            (_, rejected), (_, chosen) = sorted([other, (one.score, said)])
            found.append(Pair(({"role": "user", "content": one.topic},), chosen, rejected))
    return found


def _partner(
    waiting: list[tuple[float, str]], score: float, said: str, gap: float, matched: bool
) -> tuple[float, str] | None:
    """The first that may be paired: which of the two is better, or longer, plays no part."""
    for other, text in waiting:
        short, long = sorted([len(said), len(text)])
        if abs(other - score) >= gap and (not matched or long <= MATCHED * short):
            return other, text
    return None


def longer_chosen(pairs: Sequence[Pair]) -> float:
    """How often the chosen answer is the longer one, in characters; a tie counts half.

    What "prefer the longer answer" gets right: far from 0.5, the pairs teach it.
    """
    sizes = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return sum((a > b) + (a == b) / 2 for a, b in sizes) / len(sizes)


def read_pairs(source: str | Path, mistakes: Mistakes) -> list[Pair]:
    """Pairs out of files or a dataset of the hub; see `as_pair` for what a row may have.

    Args:
        source: as for `mptbook.data.conversations.read_conversations`.
        mistakes: where rows that are no pair are counted.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file cannot be read, or there is no pair at all; at the first bad row,
            if `mistakes` says so.
        ConnectionError: if the hub does not give the dataset.
    """
    pairs = []
    for where, row in read_rows(str(source)):
        try:
            pairs.append(as_pair(row() if callable(row) else row, where))
        except ValueError as error:
            mistakes.note(where, error)
    if not pairs:
        raise ValueError(f"{source} has no pairs; {(*mistakes.lines(), 'it has no rows')[0]}")
    return pairs


def as_pair(row: Any, where: str = "") -> Pair:
    """A pair out of a row with the columns `prompt`, `chosen` and `rejected`.

    `prompt` is text or a list of messages; the answers are text, or a list with one message of
    the assistant. Without `prompt` both are whole conversations that differ in their last turn:
    lists of messages, or text with "Human:" and "Assistant:", as in HH-RLHF.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is a {type(row).__name__}, not an object with columns")
    for column in ("chosen", "rejected"):
        if not row.get(column):
            raise ValueError(f"it has no {column}")
    if row.get("prompt"):
        prompt = _turns(row["prompt"], "user", "prompt")
        chosen, rejected = (_turns(row[key], "assistant", key) for key in ("chosen", "rejected"))
    else:
        chosen, rejected = (_conversation(row[key], key) for key in ("chosen", "rejected"))
        shared = len(chosen) - 1
        prompt = chosen[:shared]
        if not prompt or rejected[:shared] != prompt:
            raise ValueError("it has no prompt, and chosen and rejected share no conversation")
        chosen, rejected = chosen[shared:], rejected[shared:]
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if len(answer) != 1:
            raise ValueError(f"{name} has {len(answer)} turns; it should be one answer")
        check_turns([*prompt, *answer])
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return Pair(tuple(prompt), chosen[0]["content"], rejected[0]["content"], where)


def _conversation(value: Any, name: str) -> list[Message]:
    return spoken(value) if isinstance(value, str) else _turns(value, "", name)


def _turns(value: Any, role: str, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return value
    raise ValueError(f"{name} is neither text nor a list of messages")
