"""How well a model answers conversations that it has not learned from.

Dimensions in this file
    T   tokens of a row
"""

from collections.abc import Mapping, Sequence

import torch

from mptbook import world
from mptbook.data.packing import IGNORE
from mptbook.data.responses import LEARNED, apart
from mptbook.eval.perplexity import Prediction
from mptbook.finetune.gather import HeldOut
from mptbook.infer.chat import Answer, answer
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, autocast
from mptbook.tokenizer.chat import ChatTemplate, encode_prompt
from mptbook.tokenizer.tokenizer import Tokenizer

# How the default instructions ask for one of two words, and the two.
FORMS = {"Answer yes or no:": ("Yes.", "No."), "Answer true or false:": ("True.", "False.")}


@torch.no_grad()
def response_loss(
    model: MPT, heldout: HeldOut, *, batch_rows: int = 16, precision: Precision = "auto"
) -> Prediction:
    """What the answers of held-out conversations cost a model that is given what precedes them.

    Where several processes work together, all call this, share the rows, and get the same.

    Returns:
        Nats, tokens, and bytes of what is learned of them, marks and end-of-texts included.
    """
    model.eval()
    rows = torch.from_numpy(heldout.rows).long()
    blocks = rows.split(batch_rows)
    own = blocks[world.rank() :: world.size()]
    nats = 0.0
    for turn in range(-(-len(blocks) // world.size())):
        # Who has no more takes part for the others' sake: parts of the weights are with it.
        block = (own[turn] if turn < len(own) else blocks[0]).to(model.device)
        inputs, targets, conversations = apart(block[:, :-1], block[:, 1:])
        with autocast(model.device, precision):
            loss = float(model.loss(inputs, targets, conversations))
        nats += loss if turn < len(own) else 0.0
    _, targets, _ = apart(rows[:, :-1], rows[:, 1:])
    (nats,) = world.total([nats], model.device)
    return Prediction(nats, int((targets != IGNORE).sum()), heldout.learned_bytes)


def few(heldout: Mapping[str, HeldOut], rows: int) -> dict[str, HeldOut]:
    """Of each source at most so many rows; the bytes are those of the kept share of tokens."""
    kept = {}
    for name, of_source in heldout.items():
        front = of_source.rows[:rows]
        learned = [int(((part & LEARNED) != 0).sum()) for part in (front, of_source.rows)]
        n_bytes = round(of_source.learned_bytes * learned[0] / learned[1])
        kept[name] = HeldOut(front, n_bytes, of_source.conversations)
    return kept


def answered(
    model: MPT,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    heldout: HeldOut,
    n: int,
    *,
    max_new_tokens: int = 64,
    batch: int = 32,
) -> list[tuple[str, Answer]]:
    """What the user asked last, and what the model answers, most likely token by token.

    Args:
        n: how many of the held-out conversations, from the front, of those whose prompt fits into
            a row of the model.
    """
    asked = [one.messages[:-1] for one in heldout.conversations]
    room = model.config.max_seq_len
    asked = [m for m in asked if len(encode_prompt(template, tokenizer, m)) <= room][:n]
    found: list[Answer] = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        found += answer(model, tokenizer, template, part, max_new_tokens=max_new_tokens)
    return [(m[-1]["content"], one) for m, one in zip(asked, found, strict=True)]


def follows(asked: str, text: str) -> bool | None:
    """Whether an answer has the form that was asked for; None if none was."""
    for words, allowed in FORMS.items():
        if words in asked:
            return text.strip() in allowed
    return None


def training_bytes(model: MPT, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The memory of a model that is being trained, once a step was taken, without activations.

    Returns:
        Bytes of its weights, of their gradients while there are any, and of the optimizer's
        state.
    """
    weights = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.nbytes for weight in weights if weight.requires_grad),
        "optimizer": sum(value.nbytes for value in states),
    }


def shares(answers: Sequence[tuple[str, Answer]]) -> dict[str, float | None]:
    """Of answers the part that ended by itself, and of those asked for a form that which has it.

    None where there are none.
    """
    forms = [form for asked, one in answers if (form := follows(asked, one.text)) is not None]
    return {
        "ended": sum(one.ended for _, one in answers) / len(answers) if answers else None,
        "in form": sum(forms) / len(forms) if forms else None,
    }
