"""What other engines make of our models: the same, or a refusal."""

import json
import math
import re

import gguf as library
import pytest
import tokenizers
import torch
from exported_model import PROMPT, UNUSUAL, make

from mptbook import Tokenizer, load_model
from mptbook.export import ctranslate2, fields, gguf, hf, onnx, verify
from mptbook.export.fields import EVERY, HONOURED, refuse, unusual
from mptbook.model.config import MPTConfig

# Nats. llama.cpp approximates GELU with tanh, out of a table of float16 numbers.
ENGINES = {
    "hf": (hf, 1e-3),
    "ctranslate2": (ctranslate2, 1e-3),
    "onnx": (onnx, 1e-3),
    "gguf": (gguf, 0.05),
}
HERE = [(name, field) for name in ENGINES for field in sorted(HONOURED[name])]
LOST = [(name, field) for name in HONOURED for field in sorted(EVERY - HONOURED[name])]


def written_by(target, folder, dtype=None):
    out = folder.parent / target
    out.mkdir()
    engine = ENGINES[target][0]
    engine.write(folder, out, dtype or engine.DTYPES[0])
    return verify.compared(folder, PROMPT, engine.greedy(out, PROMPT, 12))


def test_every_field_of_these_tests_is_one_that_exports_look_at():
    assert UNUSUAL.keys() == EVERY
    for name, changes in UNUSUAL.items():
        config = MPTConfig(d_model=48, n_heads=6, n_layers=1).replace(**changes)
        assert name in unusual(config)
    assert unusual(MPTConfig.named("mpt-30b")) == {}
    assert unusual(MPTConfig.named("mpt-7b-storywriter")) == {
        "alibi_bias_max": (16, 8),
        "clip_qkv": (6, None),
    }


@pytest.mark.parametrize("target", ENGINES)
def test_an_engine_writes_what_ours_writes(target, tmp_path):
    found = written_by(target, make(tmp_path / "m"))
    assert (found.tokens, found.same) == (12, 12)
    assert found.difference < ENGINES[target][1]


@pytest.mark.parametrize(("target", "field"), HERE)
def test_a_field_that_an_engine_knows_is_honoured(target, field, tmp_path):
    found = written_by(target, make(tmp_path / "m", **UNUSUAL[field]))
    assert found.same == 12
    assert found.difference < ENGINES[target][1]


@pytest.mark.parametrize(("target", "field"), LOST)
def test_a_field_that_an_engine_passes_over_is_refused_by_name_and_value(target, field):
    config = MPTConfig(d_model=48, n_heads=6, n_layers=1).replace(**UNUSUAL[field])
    with pytest.raises(ValueError, match=f"{target} cannot express ") as caught:
        refuse(config, target)
    said = re.fullmatch(
        rf"{target} cannot express (.*) and would compute (.*) instead; export to .*onnx.*",
        str(caught.value),
    )
    value, usual = unusual(config)[field]
    assert f"{field}={value}" in said[1]
    assert f"{field}={usual}" in said[2]


@pytest.mark.parametrize("target", ["hf", "vllm"])
@pytest.mark.parametrize(
    "fields",
    [
        {"norm_type": "layernorm"},
        {"attn_pdrop": 0.1, "emb_pdrop": 0.2, "resid_pdrop": 0.1},
        {"attn_type": "grouped_query_attention", "kv_n_heads": 6},
        {"softmax_scale": 1 / 4, "clip_qkv": 6},
        {"d_model": 64, "n_heads": 1, "attn_type": "multiquery_attention"},
    ],
)
def test_a_configuration_is_written_as_its_readers_take_it(target, fields, tmp_path):
    given = fields | ({"softmax_scale": None} if target == "vllm" else {})
    folder, out = make(tmp_path / "m", **given), tmp_path / "o"
    out.mkdir()
    hf.write(folder, out, "float32", target)
    about = json.loads((out / "config.json").read_text())
    # What vLLM 0.28 asserts of an MPT, and transformers' strict types.
    assert about["norm_type"] == "low_precision_layernorm"
    assert "kv_n_heads" not in about["attn_config"]
    assert about["attn_config"]["attn_type"] == "multihead_attention"
    assert about["attn_config"]["attn_pdrop"] == 0
    found = verify.compared(folder, PROMPT, hf.greedy(out, PROMPT, 12))
    assert found.same == 12
    assert found.difference < 1e-3


def test_nothing_of_a_released_directory_points_at_code_that_is_not_there(tmp_path):
    folder, out = make(tmp_path / "m"), tmp_path / "o"
    about = json.loads((folder / "config.json").read_text())
    about |= {"auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(about))
    out.mkdir()
    hf.write(folder, out, "float32")
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert not {"auto_map", "torch_dtype"} & written.keys()


@pytest.mark.parametrize(
    ("target", "fields", "said"),
    [
        ("vllm", {"expansion_ratio": 2.5}, "vllm cannot express expansion_ratio=2.5, only whole"),
        ("vllm", {"alibi_bias_max": 4.5}, "alibi_bias_max=4.5, only whole numbers; export to onnx"),
        ("vllm", {"norm_eps": 1e-3, "expansion_ratio": 2.5}, "norm_eps=0.001 and would compute"),
        ("hf", {"expansion_ratio": 2.5}, "hf cannot express expansion_ratio=2.5 and would compute"),
    ],
)
def test_a_fraction_where_readers_want_a_whole_number_is_refused(target, fields, said):
    config = MPTConfig(d_model=48, n_heads=6, n_layers=1).replace(**fields)
    with pytest.raises(ValueError, match=said) as caught:
        refuse(config, target)
    assert "vllm or" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ("hf", "alibi_bias_max"),
        ("hf", "alibi"),
        ("hf", "logit_scale"),
        ("ctranslate2", "alibi_bias_max"),
        ("ctranslate2", "clip_qkv"),
        ("ctranslate2", "softmax_scale"),
        ("gguf", "softmax_scale"),
        ("gguf", "logit_scale"),
    ],
)
def test_what_is_refused_would_have_been_another_model(target, field, tmp_path, monkeypatch):
    monkeypatch.setitem(fields.HONOURED, target, EVERY)
    found = written_by(target, make(tmp_path / "m", **UNUSUAL[field]))
    assert found.difference > 0.2


def test_storywriters_slopes_and_clipping_reach_llama_cpp(tmp_path):
    found = written_by("gguf", make(tmp_path / "m", alibi_bias_max=16, clip_qkv=0.75))
    assert found.same == 12
    assert found.difference < 0.05


@pytest.mark.parametrize(
    ("target", "dtype", "most"),
    [
        ("hf", "bfloat16", 1.0),
        ("hf", "float16", 0.2),
        ("ctranslate2", "float16", 0.2),
        ("ctranslate2", "int8", 2.0),
    ],
)
def test_fewer_bits_are_near(target, dtype, most, tmp_path):
    found = written_by(target, make(tmp_path / "m"), dtype)
    exact = ENGINES[target][1]
    assert exact < found.difference < most  # rounded, and not beyond what rounding does
    assert found.same > 6


@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q4_0"])
def test_llama_cpp_computes_with_the_numbers_that_the_file_holds(dtype, tmp_path):
    folder = make(tmp_path / "m")
    (tmp_path / "o").mkdir()
    gguf.write(folder, tmp_path / "o", dtype)
    stored = library.GGUFReader(tmp_path / "o" / f"model-{dtype}.gguf").tensors
    stored = {tensor.name: tensor for tensor in stored}
    model = load_model(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            tensor = stored[gguf._name(name)]
            values = library.dequantize(tensor.data, tensor.tensor_type)
            weight.copy_(torch.tensor(values).view_as(weight))
    written = gguf.greedy(tmp_path / "o", PROMPT, 12)
    found = verify.compare(model, PROMPT, written)
    # It rounds what it multiplies with, too, to as many bits, of weights three times the usual.
    assert found.difference < 0.6
    assert found.difference < verify.compared(folder, PROMPT, written).difference
    assert found.same >= 9
    assert stored["output_norm.weight"].tensor_type == library.GGMLQuantizationType.F32


def test_weights_stored_in_sixteen_bits_are_widened_exactly(tmp_path):
    found = written_by("ctranslate2", make(tmp_path / "m", torch.bfloat16))
    assert found.difference < 1e-3


def test_a_width_that_blocks_do_not_divide_is_refused(tmp_path):
    folder = make(tmp_path / "m", d_model=72)
    with pytest.raises(ValueError, match="d_model is 72, but q4_0 packs 32 numbers together"):
        gguf.write(folder, tmp_path, "q4_0")


def test_llama_cpp_splits_texts_as_our_tokenizer_does(tmp_path):
    llama = pytest.importorskip("xllamacpp")
    folder = make(tmp_path / "m")
    gguf.write(folder, tmp_path, "f32")
    settings = llama.CommonParams()
    settings.model.path = str(tmp_path / "model-f32.gguf")
    settings.n_ctx, settings.warmup, settings.verbosity = 64, False, -1
    server, ours = llama.Server(settings), Tokenizer.load(folder)
    for text in [
        "the cat  sat, 3 times\n\n  at",
        "Na\u00efve caf\u00e9 \u2014 \u6771\u4eac 123,456.78 don't they'll",
        "def f(x):\n    return x\n\t\tend   ",
        "<|endoftext|> a\u00a0b  \u3000 c \U0001f600\r\n",
    ]:
        question = {"content": text, "add_special": False, "parse_special": False}
        assert gguf._ask(server, "/tokenize", question)["tokens"] == ours.encode(text)


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path):
    folder = make(tmp_path / "m")
    file = str(folder / "tokenizer.json")
    other = tokenizers.Tokenizer.from_file(file)
    other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    other.save(file)
    with pytest.raises(ValueError, match=r"splits texts by .*Whitespace"):
        gguf.write(folder, tmp_path, "f32")


def test_a_tokenizer_of_whole_words_is_refused(tmp_path):
    folder = make(tmp_path / "m")
    words = {"<|endoftext|>": 0, "the": 1}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"and their words by WordLevel; llama.cpp would split"):
        gguf.write(folder, tmp_path, "f32")


def test_a_likelihood_that_is_not_told_is_not_compared(tmp_path):
    folder = make(tmp_path / "m")
    out = tmp_path / "o"
    out.mkdir()
    ctranslate2.write(folder, out, "float32")
    (first, log), *rest = ctranslate2.greedy(out, PROMPT, 5)
    told = verify.compared(folder, PROMPT, [(first, None), *rest])
    assert told.difference < 1e-3
    assert math.isnan(verify.compared(folder, PROMPT, [(first, None)]).difference)
    assert math.isnan(verify.compared(folder, PROMPT, [*rest, (first, math.nan)]).difference)
    wrong = verify.compared(folder, PROMPT, [(first, log + 0.5), *rest])
    assert wrong.difference == pytest.approx(0.5, abs=1e-3)
