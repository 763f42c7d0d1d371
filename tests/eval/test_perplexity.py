import json
import math

import pytest
import torch
import torch.nn.functional as F

from mptbook.__main__ import main
from mptbook.directory import save_model
from mptbook.eval.perplexity import Prediction, bits_per_byte, perplexity
from mptbook.infer.load import save_packed
from mptbook.infer.quantize import is_packed, pack, unpack
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

TEXTS = ["the cat sat on the mat — twice\n", "a dog\n", "ate the hat on the mat\n" * 3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return MPT(MPTConfig(d_model=24, n_heads=3, n_layers=2, max_seq_len=19, vocab_size=300))


def test_a_model_that_knows_nothing_pays_the_log_of_the_vocabulary(model, tokenizer):
    blank = MPT(model.config)
    torch.nn.init.zeros_(blank.transformer.wte.weight)  # all logits are 0
    found = perplexity(blank, tokenizer, TEXTS)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    assert found.targets == tokens
    assert found.loss == pytest.approx(math.log(300), rel=1e-6)
    assert found.perplexity == pytest.approx(300, rel=1e-5)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(300) / found.bytes, rel=1e-6)


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_rows_by_hand_equal_the_sum(model, tokenizer, batch_rows):
    stream = [0]
    for text in TEXTS:
        stream += [*tokenizer.encode(text), 0]
    nats = 0.0
    for start in range(0, len(stream) - 1, 19):
        row = torch.tensor([stream[start : start + 20]])
        nats += F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="sum").item()
    found = perplexity(model, tokenizer, TEXTS, batch_rows=batch_rows, precision="fp32")
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.targets == len(stream) - 1


def test_dropout_is_off(model, tokenizer):
    drops = MPT(model.config.replace(resid_pdrop=0.5)).train()
    drops.load_state_dict(model.state_dict())
    assert perplexity(drops, tokenizer, TEXTS) == perplexity(model, tokenizer, TEXTS)


def test_predictions_add_up_from_sums_and_not_from_means():
    total = Prediction(10.0, 5, 20) + Prediction(2.0, 10, 4)
    assert total == Prediction(12.0, 15, 24)
    assert total.loss == 0.8


def test_one_bit_for_each_byte():
    assert bits_per_byte(nats=8 * math.log(2), n_bytes=8) == pytest.approx(1)


def test_no_text_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="there is no text"):
        perplexity(model, tokenizer, ["", ""])


def test_a_directory_of_packed_weights_has_the_bits_per_byte_of_its_weights(
    tokenizer, tmp_path, capsys
):
    torch.manual_seed(1)
    exact = MPT(MPTConfig(d_model=64, n_heads=2, n_layers=2, max_seq_len=19, vocab_size=300))
    with torch.no_grad():
        exact.transformer.wte.weight.mul_(20)  # so that rounding shows in the third digit
    save_model(exact, tmp_path / "exact", tokenizer)
    save_packed(tmp_path / "exact", tmp_path / "packed", 4)
    with torch.no_grad():
        for name, weight in exact.named_parameters():
            if is_packed(name):
                weight.copy_(unpack(*pack(weight, 4)))
    save_model(exact, tmp_path / "rounded", tokenizer)
    rows = [json.dumps({"text": f"{n} cats sat on the mat"}) for n in range(300)]
    (tmp_path / "cats.jsonl").write_text("\n".join(rows))
    found = {}
    for name in ("exact", "packed", "rounded"):
        words = ["--source", f"cats={tmp_path / 'cats.jsonl'}", "--precision", "fp32"]
        assert main(["evaluate", str(tmp_path / name), *words]) == 0
        found[name] = float(capsys.readouterr().out.splitlines()[-1].split()[1])
    # Inputs are rounded, and so is what is shown.
    assert abs(found["packed"] - found["rounded"]) <= 0.0021
    assert abs(found["packed"] - found["exact"]) > 0.01
