"""What a finetuning learns from and is measured on: conversations, checked, split and packed."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mptbook.data.conversations import Conversation, Mistakes, read_conversations
from mptbook.data.instructions import all_questions, clean_mix, held_out, without_overlap
from mptbook.data.responses import ResponseRows, pack_conversations
from mptbook.tokenizer.chat import ChatTemplate, check_marks, encode_pieces
from mptbook.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mptbook.finetune.sft import Finetune


@dataclass(frozen=True)
class HeldOut:
    """Conversations of one source to measure on."""

    rows: np.ndarray  # as `pack_conversations` makes them
    learned_bytes: int  # of their answers, as UTF-8
    conversations: list[Conversation]


@dataclass
class Gathered:
    """All that a finetuning is given.

    Attributes:
        rows: of each source, to learn from.
        heldout: of each source, to measure on; sources without any are left out.
        mistakes: what was wrong with rows that were left out.
        overlaps: conversations left out because an evaluation set asks the same, by set and match.
        counts: conversations learned from, by source.
        filling: part of the places of all rows that no conversation has.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    heldout: dict[str, HeldOut] = field(default_factory=dict)
    mistakes: Mistakes = field(default_factory=Mistakes)
    overlaps: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    filling: float = 0.0

    @property
    def response_rows(self) -> ResponseRows:
        return ResponseRows(self.rows)

    def as_json(self) -> dict:
        """What was gathered and what was left out, for a log."""
        bad = self.mistakes
        return {
            "conversations": self.counts,
            "heldout": {name: len(part.conversations) for name, part in self.heldout.items()},
            "filling": round(self.filling, 4),
            "left_out": [
                {"what": kind, "rows": n, "first": bad.named[kind]}
                for kind, n in bad.counts.most_common()
            ],
            "overlaps": [[*match, n] for match, n in sorted(self.overlaps.items())],
        }

    def lines(self) -> list[str]:
        """The same for people."""
        n = sum(self.counts.values())
        said = [f"{n:,} conversations in rows that are {1 - self.filling:.1%} full"]
        said += self.mistakes.lines()
        if self.overlaps:
            sets = ", ".join(sorted({name for name, _ in self.overlaps}))
            n = self.overlaps.total()
            said.append(f"left out {n:,} conversations with questions of evaluation sets ({sets})")
        return said


@dataclass(frozen=True)
class Layout:
    """How conversations become rows."""

    template: ChatTemplate
    tokenizer: Tokenizer
    row_tokens: int
    settings: "Finetune"

    def encode(
        self, conversations: Iterable[Conversation], mistakes: Mistakes
    ) -> tuple[list[tuple[list[int], list[bool]]], list[Conversation], int]:
        """The ids of those that fit, these themselves, and the bytes of what is learned.

        What is longer than a row is a mistake, or cut at the row's end, as `too_long` says. A
        conversation that has no learned token left is a mistake either way.
        """
        pieces, fit = [], []
        for one in conversations:
            messages = one.messages
            if self.settings.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.settings.system}, *messages]
            try:
                check_marks(messages, self.template, self.tokenizer)
                pieces.append(self.template.pieces(messages))
                fit.append(one)
            except ValueError as error:
                mistakes.note(one.where, error)
        examples, kept, n_bytes = [], [], 0
        encoded = encode_pieces(self.tokenizer, pieces, self.settings.loss_on)
        for one, of_one, (ids, learned) in zip(fit, pieces, encoded, strict=True):
            room = self.row_tokens + 1
            if len(ids) > room and self.settings.too_long == "refuse":
                mistakes.note(one.where, f"it has {len(ids)} tokens, and a row holds {room}")
            elif not any(learned[:room]):
                mistakes.note(one.where, f"nothing of the answer lies in the first {room} tokens")
            else:
                examples.append((ids[:room], learned[:room]))
                kept.append(one)
                own = [text for text, own in of_one if own]
                own = own if self.settings.loss_on == "all" else own[-1:]
                if len(ids) > room:  # what is left of them
                    left = zip(ids[:room], learned[:room], strict=True)
                    own = [self.tokenizer.decode(id for id, is_learned in left if is_learned)]
                n_bytes += sum(len(text.encode()) for text in own)
        return examples, kept, n_bytes

    def pack(self, examples: list[tuple[list[int], list[bool]]]) -> np.ndarray:
        return pack_conversations(examples, self.row_tokens, self.tokenizer.end_of_text)


def gather(
    settings: "Finetune", template: ChatTemplate, tokenizer: Tokenizer, row_tokens: int
) -> Gathered:
    """Read, check, split, encode and pack what `settings` name.

    Args:
        row_tokens: of a row.

    Raises:
        ValueError: if a source has nothing to learn from; or for a bad row, if `on_bad` is `stop`.
    """
    layout = Layout(template, tokenizer, row_tokens, settings)
    found = Gathered(mistakes=Mistakes(settings.on_bad))
    if settings.source:
        sources = {
            name: list(read_conversations(source, found.mistakes))
            for name, source in settings.source.items()
        }
        if settings.keep_evaluation_out:
            sources = _without_evaluation(sources, found)
    else:
        sources, found.overlaps = clean_mix(settings.mix)
        # What does not fit is known of these, and no mistake of the user's.
        found.mistakes.on_bad = "skip"
    places = used = 0
    for name, conversations in sources.items():
        sides: list[list[Conversation]] = [[], []]
        for one in conversations:
            sides[settings.hold_out and held_out(one)].append(one)
        examples, kept, _ = layout.encode(sides[0], found.mistakes)
        if not examples:
            if settings.source:
                raise ValueError(f"{name} has no conversation to learn from: {_why(found)}")
            continue  # a default part of long texts, and short rows
        found.rows[name], found.counts[name] = layout.pack(examples), len(kept)
        places += found.rows[name].size
        used += sum(len(ids) for ids, _ in examples)
        examples, kept, n_bytes = layout.encode(sides[1], found.mistakes)
        if examples:
            found.heldout[name] = HeldOut(layout.pack(examples), n_bytes, kept)
    found.filling = 1 - used / places
    return found


def _without_evaluation(
    sources: dict[str, list[Conversation]], found: Gathered
) -> dict[str, list[Conversation]]:
    overlap = all_questions()
    kept = {}
    for name, conversations in sources.items():
        kept[name], matches = without_overlap(conversations, overlap)
        found.overlaps.update(matches.values())
    return kept


def _why(found: Gathered) -> str:
    if found.mistakes.counts:
        return found.mistakes.lines()[0]
    return "all are asked by evaluation sets, or held out" if found.overlaps else "it is empty"
