import json

import pytest
import torch

from mptbook import load_model
from mptbook.data.conversations import Mistakes, read_conversations
from mptbook.finetune.gather import HeldOut
from mptbook.finetune.lora import Lora
from mptbook.finetune.measure import answered, few, follows, response_loss, shares, training_bytes
from mptbook.finetune.sft import FinetuneRun
from mptbook.infer.chat import Answer
from mptbook.tokenizer.chat import encode_messages
from mptbook.train.course import staged_steps


def test_the_loss_of_answers_is_that_of_their_tokens_alone(chosen, base, tmp_path):
    run = FinetuneRun.make(chosen(tmp_path))
    heldout = run.heldout["talk"]
    found = response_loss(run.model, heldout, batch_rows=1, precision="fp32")
    model, nats, n_tokens = load_model(base), 0.0, 0
    for one in heldout.conversations:
        ids, learned = encode_messages(run.template, run.tokenizer, one.messages, loss_on="all")
        logits = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        for place, (id, own) in enumerate(zip(ids[1:], learned[1:], strict=True)):
            if own:
                nats, n_tokens = nats - float(logits[place, id].detach()), n_tokens + 1
    assert found.targets == n_tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)
    said = sum(len(m["content"]) for one in heldout.conversations for m in one.messages[1::2])
    n_answers = sum(len(one.messages) // 2 for one in heldout.conversations)
    assert found.bytes == said + n_answers * len("<|im_end|>\n")


def test_a_few_rows_have_their_share_of_the_bytes(chosen, tmp_path):
    heldout = FinetuneRun.make(chosen(tmp_path)).heldout
    (some,) = few(heldout, 1).values()
    (all_of,) = heldout.values()
    assert len(some.rows) == 1
    assert some.learned_bytes <= all_of.learned_bytes
    assert few(heldout, 99)["talk"].learned_bytes == all_of.learned_bytes


@pytest.mark.parametrize(
    ("asked", "text", "expected"),
    [
        ("A hare ran.\n\nAnswer yes or no: did it?", "Yes.", True),
        ("A hare ran.\n\nAnswer yes or no: did it?", "Yes, it did.", False),
        ("A hare ran.\n\nAnswer true or false: did it?", " False.\n", True),
        ("A hare ran.\n\nAnswer true or false: did it?", "No.", False),
        ("Did it?", "Yes.", None),
    ],
)
def test_an_answer_has_the_form_or_has_it_not(asked, text, expected):
    assert follows(asked, text) is expected


def test_shares_count_what_ended_and_what_has_its_form():
    asked = "Answer yes or no: did it?"
    answers = [
        (asked, Answer("Yes.", True)),
        (asked, Answer("It", False)),
        ("?", Answer("a", True)),
    ]
    assert shares(answers) == {"ended": 2 / 3, "in form": 1 / 2}
    assert shares(answers[2:]) == {"ended": 1.0, "in form": None}
    assert shares([]) == {"ended": None, "in form": None}


def test_only_prompts_that_fit_a_row_are_answered(chosen, talk, tmp_path):
    lines = [{"prompt": "why " * n, "response": "so"} for n in (300, 2, 3)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    conversations = list(read_conversations(str(tmp_path / "long.jsonl"), Mistakes()))
    run = FinetuneRun.make(chosen(tmp_path))
    heldout = HeldOut(run.heldout["talk"].rows, 1, conversations)
    found = answered(run.model, run.tokenizer, run.template, heldout, 9, max_new_tokens=2)
    assert [asked for asked, _ in found] == ["why why ", "why why why "]


def test_adapters_have_the_only_gradients_and_states(chosen, tmp_path):
    found = {}
    for rank in (0, 2):
        run = FinetuneRun.make(chosen(tmp_path, lora=Lora(rank=rank)))
        next(staged_steps(run.settings, run, 0))
        found[rank] = training_bytes(run.model, run.optimizer)
    whole, thin = found[0], found[2]
    n_adapters = 2 * 2 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)  # blocks, rank, in and out
    assert thin["gradients"] == 4 * n_adapters
    assert thin["weights"] == whole["weights"] + thin["gradients"]
    assert whole["gradients"] == whole["weights"]
    n_weights = {0: 1 + 2 * 6 + 1, 2: 2 * 4 * 2}  # embedding, blocks of 2 norms, last norm
    for rank, sizes in found.items():  # AdamW has two numbers for each, and a counter for a weight
        assert sizes["optimizer"] == 2 * sizes["gradients"] + 4 * n_weights[rank]
