"""Conversations out of files and of datasets of the hub, in the shapes in which people keep them.

    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    {"prompt": "Why?", "response": "So."}        and the other names of the two in `PAIRS`
    {"chosen": "\\n\\nHuman: Why?\\n\\nAssistant: So.", "rejected": ...}     or in "text"

A row that is none, or no conversation to learn from, is a mistake: named, counted, and left out
or the end, as the caller says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mptbook.data.sources import HUB, decode, has_value, open_hub, open_table, source_files
from mptbook.tokenizer.chat import check_turns

TURNS = "messages", "conversations", "conversation"  # columns with a list of turns
PAIRS = (
    ("prompt", "instruction", "question", "query", "message_1"),
    ("response", "output", "completion", "answer", "chatgpt_answers", "message_2"),
)
BESIDE = "input", "context"  # what a prompt is about, where it has a column of its own
ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"}
# A prompt that is laid out for MPT-Instruct already, as those of dolly_hhrlhf are.
LAID_OUT = re.compile(
    r"\s*Below is an instruction.*?### Instruction:\s*(.*?)\s*### Response:\s*", re.DOTALL
)
# Anthropic's dialogues have blank lines between turns, Guanaco's three hashes before each.
SPOKEN = re.compile(r"(?:^|\n\n|### )(Human|Assistant): ?")


@dataclass(frozen=True)
class Conversation:
    """Turns to learn from.

    Attributes:
        where: file and line, or dataset and row.
        messages: turns, each with role and content.
        group: conversations of one group are on the same side of a split.
    """

    where: str
    messages: list[dict[str, str]]
    group: str


@dataclass
class Mistakes:
    """What was wrong with rows, and with how many.

    Args:
        on_bad: `skip` counts a mistake and goes on, `stop` raises it.

    Attributes:
        counts: rows by what is wrong with them.
        named: of each kind the first rows, with what exactly was wrong.
    """

    on_bad: Literal["skip", "stop"] = "stop"
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    NAMED = 20  # rows of a kind

    def note(self, where: str, error: ValueError | str) -> None:
        """Count a row that is left out.

        Raises:
            ValueError: instead, naming the row, where `on_bad` is `stop`.
        """
        if self.on_bad == "stop":
            raise ValueError(f"{where}: {error}; mend it, or leave such rows out: --on-bad skip")
        kind = re.sub(r"\d[\d,]*", "N", str(error))
        self.counts[kind] += 1
        if self.counts[kind] <= self.NAMED:
            self.named.setdefault(kind, []).append(f"{where}: {error}")

    def lines(self) -> list[str]:
        """For people: of each kind how many, and the first."""
        return [
            f"left out {n:,} row{'s' if n > 1 else ''}, the first of them {self.named[kind][0]}"
            for kind, n in self.counts.most_common()
        ]


def read_conversations(source: str, mistakes: Mistakes) -> Iterator[Conversation]:
    """The conversations of local files or of a hub dataset.

    Args:
        source: a .jsonl, .parquet or .arrow file, a folder of such, or what
            `mptbook.data.sources.read_source` calls a dataset of the hub; with `#FIELD=VALUE` at
            its end only rows that have this value.
        mistakes: where rows that are no conversation are counted.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file cannot be read; or for a bad row, if `mistakes` says so.
        ConnectionError: if the hub does not give the dataset.
    """
    place, _, wanted = source.partition("#")
    for where, row in read_rows(place):
        try:
            value = row() if callable(row) else row
            if wanted and not has_value(value, wanted, where):
                continue
            messages = to_messages(value)
            check_turns(messages)
        except ValueError as error:
            mistakes.note(where, error)
        else:
            yield Conversation(where, messages, "\n".join(m["content"] for m in messages[:-1]))


def to_messages(row: Any) -> list[dict[str, str]]:
    """The turns of a row of any known shape, not yet checked.

    Raises:
        ValueError: if it has none of the shapes.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object with turns")
    for name in TURNS:
        if isinstance(row.get(name), Sequence) and not isinstance(row[name], str):
            return [_turn(turn) for turn in row[name]]
    prompt, response = (next((row[n] for n in names if n in row), None) for names in PAIRS)
    if prompt is not None and response is not None:
        if isinstance(response, Sequence) and not isinstance(response, str):
            response = response[0] if response else ""  # several answers: the first
        return _pair(prompt, response, [row[name] for name in BESIDE if row.get(name)])
    text = row.get("chosen", row.get("text"))
    if isinstance(text, str) and SPOKEN.match(text):
        return spoken(text)
    raise ValueError(
        f"no turns: it has {', '.join(sorted(row)) or 'nothing'}, and neither messages nor a "
        "prompt with a response"
    )


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or content is None:
        return turn
    return {"role": ALIASES.get(role, role), "content": content}


def _pair(prompt: Any, response: Any, beside: list[Any]) -> list[dict[str, str]]:
    for text in (prompt, response, *beside):
        if not isinstance(text, str):
            raise ValueError(f"a prompt or response is a {type(text).__name__}, not a text")
    laid_out = LAID_OUT.fullmatch(prompt)
    asked = "\n\n".join([laid_out[1] if laid_out else prompt, *beside])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": response}]


def spoken(text: str) -> list[dict[str, str]]:
    """The turns of a text with "Human:" and "Assistant:" before them; none if it has neither."""
    _, *parts = SPOKEN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in pairs]


def read_rows(place: str) -> Iterable[tuple[str, Any]]:
    """Where each row is, and the row; of JSON lines a function that gives it.

    Args:
        place: as `source` of `read_conversations`, without `#FIELD=VALUE`.

    Raises:
        ValueError: from that function, if the line is no JSON; else as `read_conversations`.
    """
    if place.startswith(HUB):
        for number, row in enumerate(open_hub(place, stream=True), start=1):
            yield f"{place}, row {number}", row
        return
    for file in source_files(place):
        if file.suffix == ".txt":
            raise ValueError(f"{file} is plain text; conversations are in .jsonl or .parquet")
        if file.suffix == ".jsonl":
            lines = decode(str(file), file.read_bytes()).split("\n")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", _json(line)
        else:
            for number, row in enumerate(open_table(file), start=1):
                yield f"{file}, row {number}", row


def _json(line: str) -> Callable[[], Any]:
    def read() -> Any:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON ({error})") from None

    return read
