"""Direct preference optimization: what is learned from a preferred and another answer.

Dimensions in this file
    B   pairs, or answers
    T   tokens of the longest prompt and answer

Source: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290, sections 4 and 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mptbook.data.conversations import Mistakes
from mptbook.data.preferences import Pair
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, autocast
from mptbook.tokenizer.chat import ChatTemplate, encode_messages
from mptbook.tokenizer.tokenizer import Tokenizer

Ids = list[int]


@dataclass(frozen=True)
class EncodedPair:
    """The ids of a pair, none of them empty; the answers with what ends them."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> Tensor:
    """What each pair costs, in nats: log 2 where policy and reference are the same.

    Args:
        policy_chosen, policy_rejected: (B,) log-probabilities of whole answers, see
            `answer_log_probs`, under the model that learns.
        reference_chosen, reference_rejected: (B,), under the model that it started as.
        beta: what a nat of distance from the reference is worth as reward; small lets it go far.

    Returns:
        (B,). The factor of `beta` is the implicit reward of the chosen answer over that of the
        rejected one.
    """
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    return -F.logsigmoid(beta * (chosen - rejected))


def answer_log_probs(model: MPT, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """The log-probability of each answer after its prompt, the sum over its tokens.

    Answers of unequal length are read together, padded at their end, where a causal model does
    not look before it is too late: what comes out for one does not depend on the others.

    Args:
        prompts, answers: B of each, none of them empty.

    Returns:
        (B,) float32, in nats.
    """
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    of_answer = torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        of_answer[n, len(prompts[n]) : len(row)] = True
    ids, of_answer = ids.to(model.device), of_answer.to(model.device)[:, 1:]
    hidden = model.hidden(ids[:, :-1])[of_answer]  # only where an answer's token is predicted
    targets = ids[:, 1:][of_answer]
    each = -F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")
    place = of_answer.nonzero()[:, 0]
    return torch.zeros(len(rows), device=ids.device).index_add(0, place, each)


@torch.no_grad()
def pair_log_probs(
    model: MPT,
    pairs: Sequence[EncodedPair],
    batch_pairs: int = 16,
    precision: Precision = "fp32",
) -> Tensor:
    """(B, 2) float32 on the CPU: of each pair the chosen and the rejected answer's.

    Args:
        batch_pairs: how many are read at a time.
        precision: of products; see `mptbook.model.precision.autocast`.
    """
    model.eval()
    by_length = sorted(range(len(pairs)), key=lambda n: len(pairs[n].prompt + pairs[n].chosen))
    found = torch.zeros(len(pairs), 2)
    for numbers in torch.tensor(by_length).split(batch_pairs):
        block = [pairs[n] for n in numbers.tolist()]
        prompts = [pair.prompt for pair in block] * 2
        answers = [pair.chosen for pair in block] + [pair.rejected for pair in block]
        with autocast(model.device, precision):
            log_probs = answer_log_probs(model, prompts, answers)
        found[numbers] = log_probs.view(2, -1).T.cpu()
    return found


def margins(policy: Tensor, reference: Tensor) -> Tensor:
    """(B,): by how many nats the chosen answer gained more than the rejected one.

    Times beta it is the difference of their implicit rewards.

    Args:
        policy, reference: (B, 2), each from `pair_log_probs`.
    """
    gained = policy - reference
    return gained[:, 0] - gained[:, 1]


def encode_pairs(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    max_tokens: int,
    mistakes: Mistakes,
) -> tuple[list[EncodedPair], int]:
    """The ids of pairs, as the model reads them in a conversation.

    Args:
        max_tokens: most of a prompt with an answer. A pair with a longer one is left out: what
            a cut answer is worth nobody said.
        mistakes: where pairs are counted that the template does not take.

    Returns:
        The pairs, and how many were too long.

    Raises:
        ValueError: if no pair is left; at the first bad one, if `mistakes` says so.
    """
    found, too_long = [], 0
    for pair in pairs:
        try:
            encoded = [
                _encode(template, tokenizer, pair, text) for text in (pair.chosen, pair.rejected)
            ]
        except ValueError as error:
            mistakes.note(pair.where, error)
            continue
        if max(len(prompt) + len(answer) for prompt, answer in encoded) > max_tokens:
            too_long += 1
        else:
            (prompt, chosen), (_, rejected) = encoded
            found.append(EncodedPair(prompt, chosen, rejected))
    if not found:
        why = f"{too_long} are longer than max_tokens={max_tokens}; allow more"
        raise ValueError(f"no pair is left: {why if too_long else mistakes.lines()[0]}")
    return found, too_long


def _encode(
    template: ChatTemplate, tokenizer: Tokenizer, pair: Pair, answer: str
) -> tuple[Ids, Ids]:
    messages = [*pair.prompt, {"role": "assistant", "content": answer}]
    ids, learned = encode_messages(template, tokenizer, messages)
    start = learned.index(True)
    return ids[:start], ids[start:]
