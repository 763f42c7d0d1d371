import json
import math
import shutil
import subprocess
import sys

import gguf as library
import pytest
import torch
from exported_model import export_model_of_width, verify_model_of_width
from safetensors.torch import load_file, save_file

from mptbook import Tokenizer, load_model, save_model
from mptbook.__main__ import main
from mptbook.bench.measure import peak_memory
from mptbook.directory import template_of
from mptbook.export import gguf
from mptbook.infer.generate import generate
from mptbook.infer.load import load
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import NAMED, ChatTemplate


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
    shutil.copytree(folder, folder.parent / "made")  # a model directory of some other time
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "thesis.txt").write_text("years of work")
    for arguments, reason in [
        ([str(folder), "--to", "int7", "--out", str(out)], "int8"),
        ([str(folder), "--to", "int8"], "out"),
        ([str(folder / "none"), "--to", "int8", "--out", str(out)], "does not exist"),
        ([str(folder), "--to", "int8", "--out", str(folder)], "is the model itself"),
        ([str(folder), "--to", "int8", "--out", str(folder.parent / "other")], "is there already"),
        ([str(folder), "--to", "int8", "--out", str(folder.parent / "made")], "is there already"),
        ([str(folder), "--to", "gguf", "--out", str(folder.parent / "other")], "is there already"),
        (
            [str(folder), "--to", "gguf", "--out", str(out), "--dtype", "q2"],
            "f32 and bf16 and q8_0",
        ),
        ([str(folder), "--to", "int8", "--out", str(out), "--dtype", "q8_0"], "int8 says it all"),
        ([str(folder), "--to", "fastertransformer", "--out", str(out), "--gpus", "3"], "3 GPUs"),
        ([str(folder), "--to", "gguf", "--out", str(out), "--gpus", "2"], "only fastertransformer"),
    ]:
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1
    assert not out.exists()
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder.parent / "made" / "model.safetensors").read_bytes() == weights
    assert (folder.parent / "other" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("to", ["int8", "hf", "onnx", "gguf", "ctranslate2", "fastertransformer"])
@pytest.mark.parametrize("name", ["blocks.1.ffn.up_proj", "blocks.0.norm_1", "wte"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(folder, capsys, to, name, number):
    model = load_model(folder)
    with torch.no_grad():
        weight = model.get_submodule(f"transformer.{name}").weight
        weight.view(-1)[7] = number
    save_model(model, folder, Tokenizer.load(folder))
    out = folder.parent / "out"
    assert main(["export", str(folder), "--to", to, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"transformer.{name}.weight" in error
    assert ("not finite" in error) or ("infinite or not a number" in error)
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("to", "dtype"), [("hf", "float16"), ("ctranslate2", "float16"), ("fastertransformer", "fp16")]
)
def test_a_weight_that_is_too_large_for_a_dtype_is_refused(folder, capsys, to, dtype):
    model = load_model(folder)
    with torch.no_grad():
        model.transformer.blocks[0].ffn.up_proj.weight[1, 2] = 1e5
    save_model(model, folder, Tokenizer.load(folder))
    how = ["--to", to, "--dtype", dtype, "--out", str(folder.parent / "out")]
    assert main(["export", str(folder), *how]) == 2
    assert "torch.float16, the largest of the model 100000;" in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


def test_an_engine_that_computes_another_model_keeps_nothing(folder, capsys, monkeypatch):
    out, known = folder.parent / "out", gguf.greedy

    def untold(*asked):
        return [(token, None) for token, _ in known(*asked)]

    def other(*asked):
        return [((token + 1) % 290, None) for token, _ in known(*asked)]

    def no_number(*asked):
        return [(token, math.nan) for token, _ in known(*asked)]

    for greedy, dtype, said in [
        (
            other,
            "f32",
            "nats behind those; it tells no log-probability of them; in f32 that is not",
        ),
        (no_number, "f32", "differ by at most nan nats; in f32 that is not rounding"),
        (no_number, "q8_0", "differ by at most nan nats; in q8_0 that is not rounding"),
    ]:
        monkeypatch.setattr(gguf, "greedy", greedy)
        how = ["--to", "gguf", "--dtype", dtype, "--out", str(out)]
        assert main(["export", str(folder), *how]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    monkeypatch.setattr(gguf, "greedy", untold)
    assert main(["export", str(folder), "--to", "gguf", "--out", str(out)]) == 0
    assert "it tells no log-probability of them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "dtype", "said"),
    [
        ("hf", "", "of 16 tokens that hf wrote, 16 are those that mptbook finds likeliest"),
        ("onnx", "", "of 16 tokens that onnx wrote, 16"),
        ("gguf", "", "of 16 tokens that gguf wrote, 16"),
        ("gguf", "q8_0", "of 16 tokens that gguf wrote, "),
        ("ctranslate2", "", "of 16 tokens that ctranslate2 wrote, 16"),
        ("fastertransformer", "fp32", "read back: weights differ by at most 0.0e+00"),
        ("vllm", "", "transformers reads the configuration; start vLLM on it, and compare"),
    ],
)
def test_an_export_says_what_its_engine_makes_of_it(folder, capsys, target, dtype, said):
    out = folder.parent / "out"
    how = ["--dtype", dtype] if dtype else []
    assert main(["export", str(folder), "--to", target, "--out", str(out), *how]) == 0
    assert said in capsys.readouterr().out
    assert any(out.rglob("*"))


@pytest.mark.parametrize("target", ["hf", "onnx", "gguf", "ctranslate2"])
@pytest.mark.parametrize(("tokens", "table"), [(2, False), (3, True), (16, False), (17, True)])
def test_models_of_few_tokens_are_verified_as_far_as_they_go(
    tmp_path, capsys, target, tokens, table
):
    fields = {"alibi": False} if table and target != "hf" else {}
    config = MPTConfig(d_model=64, n_heads=4, n_layers=1, max_seq_len=tokens, vocab_size=300)
    tokenizer = train_bpe(["the cat sat on the mat\n"] * 5, 290)
    save_model(MPT(config.replace(**fields)), tmp_path / "m", tokenizer)
    how = ["--to", target, "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "m"), *how]) == 0
    n = max(1, min(16, tokens - 1))
    assert f"of {n} tokens that {target} wrote, {n} are" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["hf", "onnx", "gguf", "ctranslate2", "fastertransformer"])
@pytest.mark.parametrize("kind", ["float64", "transposed"])
def test_weights_may_be_float64_or_lie_transposed(folder, capsys, target, kind):
    file = folder / "model.safetensors"
    weights = load_file(file)
    if kind == "float64":
        save_file({name: weight.double() for name, weight in weights.items()}, file)
    else:
        file.unlink()
        weights |= {n: each.T.contiguous().T for n, each in weights.items() if each.dim() > 1}
        torch.save(weights, folder / "pytorch_model.bin")
    how = ["--to", target, "--out", str(folder.parent / "out")]
    how += ["--dtype", "fp32"] if target == "fastertransformer" else []
    assert main(["export", str(folder), *how]) == 0
    said = capsys.readouterr().out
    assert ", 16 are those" in said or "by at most 0.0e+00" in said


@pytest.mark.parametrize("target", ["int8", "int4", "hf", "gguf"])
def test_a_chat_template_goes_along_wherever_it_lies(folder, target):
    file = folder / "tokenizer_config.json"  # where older releases have it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": NAMED["chatml"]}))
    out = folder.parent / "out"
    assert main(["export", str(folder), "--to", target, "--out", str(out)]) == 0
    if target == "gguf":
        kept = library.GGUFReader(out / "model-f32.gguf").get_field("tokenizer.chat_template")
        assert kept.contents() == NAMED["chatml"]
    else:
        assert template_of(out) == ChatTemplate.load("chatml")


@pytest.mark.parametrize("target", ["gguf", "ctranslate2", "fastertransformer"])
def test_what_is_missing_is_said_as_it_is(folder, capsys, target):
    (folder / "tokenizer.json").unlink()
    how = ["--to", target, "--out", str(folder.parent / "out")]
    assert main(["export", str(folder), *how]) == 2
    assert capsys.readouterr().err.startswith("error: no tokenizer at ")


def test_what_a_directory_says_of_generating_is_not_followed_when_it_is_verified(folder, capsys):
    about, out = folder / "generation_config.json", folder.parent / "out"
    wishes = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_time": 1e-9}
    about.write_text(json.dumps(json.loads(about.read_text()) | wishes))
    assert main(["export", str(folder), "--to", "hf", "--out", str(out)]) == 0
    assert "of 16 tokens that hf wrote, 16" in capsys.readouterr().out
    assert json.loads((out / about.name).read_text())["repetition_penalty"] == 5.0
    about.write_text("[]")
    assert main(["export", str(folder), "--to", "hf", "--out", str(out / "again")]) == 2
    assert "generation_config.json holds a list" in capsys.readouterr().err


def test_texts_of_one_token_cannot_be_verified(tmp_path, capsys):
    config = MPTConfig(d_model=64, n_heads=4, n_layers=1, max_seq_len=1, vocab_size=300)
    save_model(MPT(config), tmp_path / "m", train_bpe(["the cat sat on the mat\n"] * 5, 290))
    assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--out", str(tmp_path / "o")]) == 0
    assert "not verified: nothing is to be written" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["gguf", "ctranslate2"])
def test_a_tokenizer_of_another_model_is_refused(folder, capsys, target):
    train_bpe([f"{n} hares" for n in range(999)], 400).save(folder / "tokenizer.json")
    how = ["--to", target, "--out", str(folder.parent / "a" / "b" / "out")]
    assert main(["export", str(folder), *how]) == 2
    assert "the tokenizer has 400 ids, the model 300;" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(
    "target", ["int8", "hf", "onnx", "gguf", "ctranslate2", "fastertransformer"]
)
def test_a_disk_that_is_full_is_one_line_that_names_the_folder(folder, target):
    out = folder.parent / "out"
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    run = f"from mptbook.__main__ import main; raise SystemExit(main({['export', str(folder)]!r} + "
    how = ["--to", target, "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-c", f"{full}{run}{how!r}))"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("error: cannot write ")
    assert str(folder.parent) in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_an_engine_that_answers_otherwise_leaves_nothing(folder, capsys, monkeypatch):
    from mptbook.export import ctranslate2

    def wrong(out, ids, new_tokens):
        return [(token, log - 0.2) for token, log in right(out, ids, new_tokens)]

    right = ctranslate2.greedy
    monkeypatch.setattr(ctranslate2, "greedy", wrong)
    how = ["export", str(folder), "--to", "ctranslate2", "--out", str(folder.parent / "out")]
    assert main(how) == 2
    assert "by at most 2.0e-01 nats; in float32 that is not rounding" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["m"]
    assert main([*how, "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out


def test_a_missing_engine_is_one_line_that_says_how_to_have_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    out = folder.parent / "out"
    how = ["export", str(folder), "--to", "gguf", "--out", str(out)]
    assert main(how) == 2
    error = capsys.readouterr().err
    assert "xllamacpp, which is not here: pip install 'mptbook[export]'" in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()
    assert main([*how, "--no-verify"]) == 0


def test_packed_weights_and_fields_that_get_lost_are_refused(folder, capsys):
    packed, out = folder.parent / "packed", folder.parent / "out"
    assert main(["export", str(folder), "--to", "int8", "--out", str(packed)]) == 0
    capsys.readouterr()
    assert main(["export", str(packed), "--to", "gguf", "--out", str(out)]) == 2
    assert "packed in fewer bits" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    config["attn_config"]["alibi_bias_max"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["export", str(folder), "--to", "hf", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "hf cannot express alibi_bias_max=16 and would compute alibi_bias_max=8" in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.fixture
def freed_at_once(monkeypatch):
    """What is freed is the system's again at once; the allocator keeps some at random."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # of processes that begin now


@pytest.mark.parametrize("target", ["hf", "onnx", "gguf", "ctranslate2", "fastertransformer"])
@pytest.mark.usefixtures("freed_at_once")
def test_an_export_never_holds_the_model_twice(tmp_path, target):
    for width in (16, 512):
        torch.manual_seed(0)
        shape = {"n_heads": 8, "n_layers": 8, "max_seq_len": 64, "vocab_size": 2048}
        tokenizer = train_bpe(["the cat sat on the mat\n"] * 5, 290)
        save_model(MPT(MPTConfig(d_model=width, **shape)), tmp_path / f"{width}", tokenizer)
    size = (tmp_path / "512" / "model.safetensors").stat().st_size  # 105 MB
    # Pages of the file that is read count, too, though the system can have them back.
    assert peak_memory(export_model_of_width, target, str(tmp_path), 512) < 1.5 * size


@pytest.mark.usefixtures("freed_at_once")
def test_to_verify_holds_the_model_once_in_the_bits_that_it_is_stored_in(tmp_path):
    for width in (16, 512):
        torch.manual_seed(0)
        shape = {"n_heads": 8, "n_layers": 8, "max_seq_len": 64, "vocab_size": 2048}
        save_model(MPT(MPTConfig(d_model=width, **shape)).bfloat16(), tmp_path / f"{width}")
    size = (tmp_path / "512" / "model.safetensors").stat().st_size  # 53 MB
    # The file that is read counts, too, though the system can have it back.
    assert peak_memory(verify_model_of_width, str(tmp_path), 512) < 2.5 * size


def test_what_is_piped_has_no_bars(folder, capfd):
    assert main(["export", str(folder), "--to", "hf", "--out", str(folder.parent / "hf")]) == 0
    assert capfd.readouterr().err == ""
