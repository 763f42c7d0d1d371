import pytest
import torch

from mptbook import MPT, MPTConfig
from mptbook.infer import generate
from mptbook.infer.chat import Answer, answer
from mptbook.infer.slots import Slots
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import NAMED, ChatTemplate
from mptbook.tokenizer.tokenizer import Tokenizer

V = 320
MODEL = MPT(MPTConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=V))
ASK = [{"role": "user", "content": "why"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["why so, said the hare, here and there\n"] * 9, 300)


@pytest.fixture
def says(monkeypatch):
    """`says(ids, ids)`: what the model writes to each prompt, whatever they are."""

    def script(*written):
        class Scripted(Slots):
            """Logits that have one likeliest token, the next of a script."""

            def __init__(self, *given):
                super().__init__(*given)
                self.at = [0] * self.n_slots

            def _next(self, slot):
                ids, at = written[slot], self.at[slot]
                self.at[slot] += 1
                return torch.nn.functional.one_hot(torch.tensor(ids[at] if at < len(ids) else 1), V)

            def read(self, slot, ids, every=False):
                return self._next(slot).float()

            def decode(self, slots, ids):
                return torch.stack([self._next(slot) for slot in slots]).float()

        monkeypatch.setattr(generate, "Slots", Scripted)

    return script


def test_an_answer_ends_where_a_mark_is_spelled_or_the_document_ends(tokenizer, says):
    spelled = tokenizer.encode("so<|im_end|>\nhere")
    ended = [*tokenizer.encode("there"), tokenizer.end_of_text]
    on = tokenizer.encode("here and there")
    says(spelled, ended, on)
    template = ChatTemplate(NAMED["chatml"])
    found = answer(MODEL, tokenizer, template, [ASK] * 3, max_new_tokens=len(spelled))
    assert found[:2] == [Answer("so", True), Answer("there", True)]
    assert not found[2].ended
    assert found[2].text.startswith("here and there")


def test_a_mark_that_is_a_token_ends_an_answer(tokenizer, says):
    marked = Tokenizer(type(tokenizer.backend).from_str(tokenizer.backend.to_str()))
    marked.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    says([*marked.encode("so"), marked.backend.token_to_id("<|im_end|>"), 5, 6])
    found = answer(MODEL, marked, ChatTemplate(NAMED["chatml"]), [ASK])
    assert found == [Answer("so", True)]


def test_without_a_mark_only_the_document_ends_an_answer(tokenizer, says):
    says([*tokenizer.encode("so<|im_end|>"), tokenizer.end_of_text])
    found = answer(MODEL, tokenizer, ChatTemplate(NAMED["instruct"]), [ASK])
    assert found == [Answer("so<|im_end|>", True)]


def test_the_command_asks_a_model_by_its_own_template(data, tmp_path, capsys):
    from mptbook import save_model
    from mptbook.__main__ import main

    tokenizer, template = Tokenizer.load(data), ChatTemplate(NAMED["instruct"])
    torch.manual_seed(2)
    shape = {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320}
    model = MPT(MPTConfig.named("mpt-tiny").replace(**shape)).eval()
    save_model(model, tmp_path / "model", tokenizer, template=template)
    assert main(["ask", str(tmp_path / "model"), "--prompt", "why", "--max-new-tokens", "7"]) == 0
    (expected,) = answer(model, tokenizer, template, [ASK], max_new_tokens=7)
    assert capsys.readouterr().out == expected.text + "\n"
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert main(["ask", str(tmp_path / "model"), "--prompt", "why"]) == 2
    assert "has no chat template; give instruct," in capsys.readouterr().err
