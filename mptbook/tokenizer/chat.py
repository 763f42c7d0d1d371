"""Conversations as text and as ids: prompt formats, and which tokens a model learns to write.

A message is {"role": "system" | "user" | "assistant", "content": text}. A Jinja template lays
messages out as one text, as `apply_chat_template` of transformers does with the same template.
MPT-Instruct and MPT-Chat were finetuned on the formats below. GPT-NeoX's tokenizer has no tokens
for ChatML's marks: with it they are read and written in pieces, as ordinary text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant")
LossOn = Literal["last", "all"]
Messages = Sequence[Mapping[str, str]]

_ONE_TURN = """\
{%- if messages[0].role == 'system' %}{% set first, turns = messages[0].content, messages[1:] %}
{%- else %}{% set first, turns = 'BLURB', messages %}{% endif %}
{%- if turns | length > 2 %}{{ raise_exception('has one instruction and one response') }}{% endif %}
{{- first + 'GAP### Instruction:\\n' + turns[0].content }}
{%- if turns | length > 1 or add_generation_prompt %}{{ 'GAP### Response:\\n' }}{% endif %}
{%- if turns | length > 1 %}{{ turns[1].content }}{% endif %}""".replace(
    "BLURB",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
)
NAMED = {
    "instruct": _ONE_TURN.replace("GAP", r"\n\n"),  # as MPT-Instruct was finetuned
    "instruct-card": _ONE_TURN.replace("GAP", r"\n"),  # without blank lines, as on its card
    "chatml": """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}
FILE = "chat_template.jinja"  # in a model directory
PROBE = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."})


@dataclass(frozen=True)
class ChatTemplate:
    """A format for conversations.

    Args:
        source: a Jinja template as transformers has them.
    """

    source: str

    @classmethod
    def load(cls, place: str | Path) -> Self:
        """`instruct`, `instruct-card`, `chatml`, a Jinja file, or a model directory with one.

        Raises:
            FileNotFoundError: if there is no such template.
            ValueError: if it is not fit for training; see `pieces`.
        """
        template = cls(NAMED.get(str(place)) or _read(Path(place)))
        template.pieces(PROBE)
        return template

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        """The text of messages.

        Args:
            generation_prompt: also what stands before the assistant's next answer.

        Raises:
            ValueError: if the template cannot be read, or refuses the messages.
        """
        try:
            return _compiled(self.source).render(
                messages=list(messages),
                add_generation_prompt=generation_prompt,
                bos_token="",
                eos_token=END_OF_TEXT,
            )
        except Exception as error:  # a template is a program, which may do anything
            raise ValueError(f"the chat template: {error}") from None

    def pieces(self, messages: Messages) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether the assistant wrote it.

        A piece of the assistant's has all that stands between the generation prompt and the
        next turn. An end-of-text at the very end is left out.

        Raises:
            ValueError: if the template has no generation prompt, or what it makes of the first
                turns changes with those that follow; or as `render`.
        """
        whole, found, end = self.render(messages), [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:number], generation_prompt=True)
            if asked == self.render(messages[:number]):
                raise ValueError(
                    "the chat template has no generation prompt (add_generation_prompt), so a "
                    "model could not tell that it is its turn; add one"
                )
            answered = self.render(messages[: number + 1])
            if not (whole.startswith(answered) and answered.startswith(asked)):
                raise ValueError(
                    f"the chat template writes turn {number + 1} differently once it is answered "
                    "or others follow, so what a model learns is not what it will be given; take "
                    "a template that only appends"
                )
            found += [(asked[end:], False), (answered[len(asked) :], True)]
            end = len(answered)
        rest = whole[end:]
        if not rest and found:
            text, own = found.pop()
            found.append((text.rstrip().removesuffix(END_OF_TEXT) if _ended(text) else text, own))
        return [(text, own) for text, own in [*found, (rest, False)] if text]

    @cached_property
    def stop(self) -> str:
        """What the template puts after an answer, without blanks: `<|im_end|>` in ChatML.

        A model that was trained with it writes this when its turn is over. "" where nothing
        comes but the end-of-text that ends every conversation.
        """
        answer = self.pieces(PROBE)[1][0]
        return answer.partition(PROBE[1]["content"])[2].strip()


def check_turns(messages: Any) -> None:
    """See that messages are a conversation to learn from.

    Raises:
        ValueError: unless they are, after at most one system turn at the front, turns of user
            and assistant by turns, from a user's to an assistant's, none of them empty.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages should be a list of turns, each with role and content")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"turn {number} has no role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"turn {number} has the unknown role {role!r}, not {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            what = "response" if role == "assistant" else f"{role} turn"
            raise ValueError(f"turn {number} is an empty {what}")
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        raise ValueError(f"there are {roles.count('system')} system turns; one at most")
    if "system" in roles[1:]:
        raise ValueError(f"turn {roles.index('system') + 1} is the system's; only the first may be")
    if roles[-1] != "assistant":
        raise ValueError(f"it ends on a turn of the {roles[-1]}; there is no answer to learn")
    for number, role in enumerate(roles[roles.count("system") :]):
        expected = ROLES[1 + number % 2]
        if role != expected:
            turn = number + 1 + roles.count("system")
            raise ValueError(f"turn {turn} is of the {role}, where the {expected} should speak")


def check_marks(messages: Messages, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """See that no turn spells a mark that would end it, or be read as a token of its own.

    Raises:
        ValueError: naming turn and mark.
    """
    marks = {template.stop, *_special(tokenizer)} - {""}
    for number, message in enumerate(messages, start=1):
        for mark in sorted(marks):
            if mark in message["content"]:
                raise ValueError(f"turn {number} spells {mark}, which marks the end of a turn")


def encode_messages(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Messages, loss_on: LossOn = "last"
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the model learns to write.

    An end-of-text follows the last answer, and is learned. Prompt and answer are encoded apart,
    as they will be when the model is asked.

    Args:
        messages: a conversation; see `check_turns`.
        loss_on: learn the last answer, or all of them.

    Returns:
        Ids, and for each True where it is learned.

    Raises:
        ValueError: if the messages are no conversation, or the template is not fit for them.
    """
    check_turns(messages)
    check_marks(messages, template, tokenizer)
    return encode_pieces(tokenizer, [template.pieces(messages)], loss_on)[0]


def encode_pieces(
    tokenizer: Tokenizer, conversations: Sequence[list[tuple[str, bool]]], loss_on: LossOn
) -> list[tuple[list[int], list[bool]]]:
    """As `encode_messages`, for the `ChatTemplate.pieces` of many conversations, on all cores."""
    texts = [text for pieces in conversations for text, _ in pieces]
    encoded = iter(tokenizer.encode_batch(texts, allow_special=True))
    found = []
    for pieces in conversations:
        last = max(number for number, (_, own) in enumerate(pieces) if own)
        ids: list[int] = []
        learned: list[bool] = []
        for number, (_, own) in enumerate(pieces):
            piece = next(encoded)
            ids += piece
            learned += [own and (loss_on == "all" or number == last)] * len(piece)
        found.append(([*ids, tokenizer.end_of_text], [*learned, True]))
    return found


def encode_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The ids of a conversation that is about to be answered, cut where training cuts them.

    Args:
        messages: the last one is the user's.
    """
    done = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    before = template.pieces(messages[: done[-1] + 1]) if done else []
    asked = template.render(messages, generation_prompt=True)
    texts = [*(text for text, _ in before), asked[sum(len(text) for text, _ in before) :]]
    return [id for ids in tokenizer.encode_batch(texts, allow_special=True) for id in ids]


def stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer: end-of-text, and the template's mark where it is one token."""
    mark = tokenizer.backend.token_to_id(template.stop) if template.stop else None
    return [tokenizer.end_of_text, *([] if mark is None else [mark])]


def _special(tokenizer: Tokenizer) -> set[str]:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special}


def _ended(text: str) -> bool:
    return text.rstrip().endswith(END_OF_TEXT)


def _read(path: Path) -> str:
    older = "tokenizer_config.json"  # where older releases have it
    places = [folder / name for folder in (path, path / "model") for name in (FILE, older)]
    for file in (each for each in (path, *places) if each.is_file()):
        try:
            text = file.read_text(encoding="utf-8")
            if file.name != older:
                return text
            about = json.loads(text)
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{file} cannot be read: {error}") from None
        found = about.get("chat_template") if isinstance(about, dict) else None
        if isinstance(found, str):
            return found
    raise FileNotFoundError(
        f"{path} has no chat template; give {', '.join(NAMED)}, a Jinja file, or a model "
        f"directory with {FILE}"
    )


class _Generation(Extension):
    """`{% generation %}` marks what the assistant writes; nothing of it is in the text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache
def _compiled(source: str) -> jinja2.Template:
    """As transformers compiles one: without access to Python, blocks on lines of their own."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = lambda value, **how: json.dumps(
        value, ensure_ascii=False, **how
    )
    return environment.from_string(source)
