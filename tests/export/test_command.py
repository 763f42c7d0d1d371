import pytest
import torch

from mptbook import Tokenizer, save_model
from mptbook.__main__ import main
from mptbook.infer.generate import generate
from mptbook.infer.load import load
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300)
    save_model(MPT(config), tmp_path / "m", train_bpe(["the cat sat on the mat\n"] * 5, 290))
    return tmp_path / "m"


@pytest.mark.parametrize(("to", "bits"), [("int8", 8), ("int4", 4)])
def test_an_exported_model_writes_what_the_model_packed_writes(folder, capsys, to, bits):
    out = folder.parent / to
    assert main(["export", str(folder), "--to", to, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("% lost") == 9
    assert "the most is lost of transformer." in printed
    packed, how = load(folder, bits), ["--prompt", "the", "--max-new-tokens", "9"]
    (expected,) = generate(packed, Tokenizer.load(folder), "the", max_new_tokens=9)
    assert main(["generate", str(out), *how, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"the{expected}\n"
    assert main(["generate", str(folder), *how, "--temperature", "0", "--bits", str(bits)]) == 0
    assert capsys.readouterr().out == f"the{expected}\n"


def test_mistakes_are_one_line_and_lose_nothing(folder, capsys):
    out = folder.parent / "q"
    weights = (folder / "model.safetensors").read_bytes()
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "thesis.txt").write_text("years of work")
    for arguments, reason in [
        ([str(folder), "--to", "int7", "--out", str(out)], "int8"),
        ([str(folder), "--to", "int8"], "out"),
        ([str(folder / "none"), "--to", "int8", "--out", str(out)], "does not exist"),
        ([str(folder), "--to", "int8", "--out", str(folder)], "is the model itself"),
        ([str(folder), "--to", "int8", "--out", str(folder.parent / "other")], "thesis.txt"),
    ]:
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1
    assert not out.exists()
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder.parent / "other" / "thesis.txt").read_text() == "years of work"
