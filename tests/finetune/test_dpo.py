"""The loss of a pair by hand, its laws, and beside trl's; log-probabilities of answers."""

import math

import pytest
import torch

from mptbook.data.conversations import Mistakes
from mptbook.data.preferences import Pair
from mptbook.finetune.dpo import (
    EncodedPair,
    answer_log_probs,
    dpo_loss,
    encode_pairs,
    margins,
    pair_log_probs,
)
from mptbook.finetune.preference import Preference
from mptbook.finetune.trainer import PairLog, hushed, make_trainer
from mptbook.hf import MPTForCausalLM
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import NAMED, ChatTemplate

TEXTS = ["why so? be brief. hare, so far from home, here and there: where do you go?\n"] * 9
CHATML = ChatTemplate(NAMED["chatml"])
PAIRS = [
    EncodedPair([5, 3, 9], [4, 4, 7, 1, 0], [2, 0]),
    EncodedPair([8], [6, 0], [1, 1, 1, 9, 3, 0]),
    EncodedPair([7, 7, 7, 2, 6, 1, 5], [3, 0], [9, 8, 0]),
]


def model(**changes):
    torch.manual_seed(5)
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, max_seq_len=17, vocab_size=11)
    return MPT(config.replace(**changes)).eval()


def randoms(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_a_pair_costs_log_2_where_the_policy_is_the_reference():
    chosen, rejected = randoms(2, 5)
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_the_loss_by_hand():
    policy, reference = torch.tensor([[-3.0, -9.0]]), torch.tensor([[-5.0, -8.0]])
    loss = dpo_loss(*policy.T, *reference.T, beta=0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.5 * (2 + 1))))
    assert float(margins(policy, reference)) == 3


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_alike():
    policy, reference = randoms(2, 5).requires_grad_(), randoms(2, 5) / 2
    dpo_loss(*policy, *reference, beta=0.3).sum().backward()
    wrong = torch.sigmoid(-0.3 * margins(policy.T, reference.T)).detach()  # how wrong it is
    torch.testing.assert_close(policy.grad, torch.stack([-0.3 * wrong, 0.3 * wrong]))


def test_what_both_answers_gain_alike_changes_nothing():
    policy, reference = randoms(2, 5), randoms(2, 5) / 2
    prompt = torch.tensor([0.0, 3.0, -70.0, 1e-3, 8.0])  # one for each prompt, as log Z is
    shifted = dpo_loss(*(policy + prompt), *reference, beta=0.3)
    torch.testing.assert_close(shifted, dpo_loss(*policy, *reference, beta=0.3))


def test_a_log_probability_is_that_of_the_answers_tokens_alone():
    one, pair = model(), PAIRS[0]
    ids = pair.prompt + pair.chosen
    each = one(torch.tensor([ids]))[0].log_softmax(dim=-1)
    expected = sum(each[n - 1, ids[n]] for n in range(len(pair.prompt), len(ids)))
    torch.testing.assert_close(answer_log_probs(one, [pair.prompt], [pair.chosen])[0], expected)


@pytest.mark.parametrize("changes", [{}, {"alibi": False}])
def test_answers_of_unequal_length_together_equal_each_alone(changes):
    one = model(**changes)
    alone = torch.cat([pair_log_probs(one, [pair]) for pair in PAIRS])
    torch.testing.assert_close(pair_log_probs(one, PAIRS), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(pair_log_probs(one, PAIRS, batch_pairs=2), alone, atol=1e-5, rtol=0)


def test_padding_before_the_prompt_changes_no_log_probability():
    """As transformers pads prompts, by its attention mask; ALiBi counts distances alone."""
    one, pair = model(), PAIRS[1]
    ids = torch.tensor([[0, 0, 0, *pair.prompt, *pair.rejected]])
    mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
    logits = MPTForCausalLM.of(one)(ids, attention_mask=mask).logits[0]
    each = logits[3:-1].log_softmax(dim=-1).gather(1, ids[0, 4:, None]).sum()
    torch.testing.assert_close(answer_log_probs(one, [pair.prompt], [pair.rejected])[0], each)


@pytest.mark.parametrize(
    "changes",
    [{}, {"logit_scale": "inv_sqrt_d_model", "tie_word_embeddings": False}, {"logit_scale": 0.7}],
)
def test_the_loss_is_trls(tmp_path, changes):
    """And so are log-probabilities, padding and the head's factor: trl computes all of them."""
    tokenizer, one = train_bpe(TEXTS, 290), model(vocab_size=290, **changes)
    reference = pair_log_probs(one, PAIRS) + randoms(3, 2).float()
    settings = Preference(
        model="", out=tmp_path, beta=0.3, micro_pairs=3, batch_pairs=3, precision="fp32"
    )
    with PairLog(tmp_path) as log, hushed():
        trainer = make_trainer(settings, one, tokenizer, PAIRS, reference, log)
        batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        theirs = trainer.compute_loss(trainer.model, batch)
    ours = dpo_loss(*pair_log_probs(one, PAIRS).T, *reference.T, beta=0.3)
    torch.testing.assert_close(theirs, ours.mean(), atol=1e-5, rtol=0)


def test_a_pair_is_encoded_as_the_model_is_asked():
    tokenizer = train_bpe(TEXTS, 290)
    pair = Pair(({"role": "user", "content": "why so?"},), "be brief.", "hare")
    (found,), too_long = encode_pairs(CHATML, tokenizer, [pair], 99, Mistakes())
    assert too_long == 0
    assert tokenizer.decode(found.prompt) == (
        "<|im_start|>user\nwhy so?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(found.chosen) == "be brief.<|im_end|>\n<|endoftext|>"
    assert found.rejected[-1] == tokenizer.end_of_text


def test_a_pair_that_is_too_long_is_left_out_and_counted():
    tokenizer = train_bpe(TEXTS, 290)
    asked = ({"role": "user", "content": "why so?"},)
    pairs = [Pair(asked, "be brief.", "hare"), Pair(asked, "hare " * 50, "go")]
    found, too_long = encode_pairs(CHATML, tokenizer, pairs, 80, Mistakes())
    assert (len(found), too_long) == (1, 1)
    with pytest.raises(ValueError, match="no pair is left: 2 are longer than max_tokens=9"):
        encode_pairs(CHATML, tokenizer, pairs, 9, Mistakes())


def test_an_answer_that_spells_the_end_of_a_turn_is_a_bad_row():
    tokenizer = train_bpe(TEXTS, 290)
    asked = ({"role": "user", "content": "why so?"},)
    pairs = [Pair(asked, "go<|im_end|>", "hare", "line 3"), Pair(asked, "go", "hare", "line 4")]
    mistakes = Mistakes("skip")
    assert len(encode_pairs(CHATML, tokenizer, pairs, 99, mistakes)[0]) == 1
    assert "line 3: turn 2 spells <|im_end|>" in mistakes.lines()[0]
