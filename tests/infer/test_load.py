import functools
import json
import resource
import sys
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file, save_file

from mptbook import Tokenizer, load_model, save_model
from mptbook.bench.measure import process_bytes
from mptbook.infer import load as load_module
from mptbook.infer import quantize as quantize_module
from mptbook.infer.generate import generate
from mptbook.infer.load import is_packed_directory, load, save_packed, weight_bytes
from mptbook.infer.quantize import PackedLinear, quantize
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import ChatTemplate

CONFIG = MPTConfig(d_model=128, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300)
FILE, OLDER = "model.safetensors", "pytorch_model.bin"
IDS = torch.randint(0, 300, (2, 15), generator=torch.Generator().manual_seed(0))


@functools.cache
def model():
    torch.manual_seed(5)
    return MPT(CONFIG).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS)


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat\n"] * 5, 290)
    save_model(model(), tmp_path / "m", tokenizer, template=ChatTemplate.load("chatml"))
    return tmp_path / "m"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_directory_of_packed_weights_is_the_model_packed(folder, tmp_path, bits):
    save_packed(folder, tmp_path / "q", bits)
    torch_packed = quantize(load_model(folder), bits)
    assert torch.equal(logits(load(tmp_path / "q")), logits(torch_packed))
    assert torch.equal(logits(load(folder, bits)), logits(torch_packed))
    names = {file.name.replace("packed", "model") for file in (tmp_path / "q").iterdir()}
    assert names == {file.name for file in folder.iterdir()}  # tokenizer and template, too


def test_many_files_are_one_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "SHARD_BYTES", 50_000)
    save_packed(folder, tmp_path / "q", 8)
    index = json.loads((tmp_path / "q" / "packed.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    found = load(tmp_path / "q")
    assert index["metadata"]["total_size"] == weight_bytes(found)
    assert torch.equal(logits(found), logits(quantize(load_model(folder), 8)))


def test_float32_stays_as_it_is_and_bfloat16_is_widened_on_a_cpu(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_module, "has_bf16", lambda device: False)
    assert torch.equal(logits(load(folder)), logits(model()))
    save_model(MPT(CONFIG).bfloat16(), tmp_path / "half")
    half = load(tmp_path / "half")
    assert isinstance(half.transformer.blocks[0].attn.Wqkv, PackedLinear)
    rounded = load_model(tmp_path / "half").float()
    torch.testing.assert_close(logits(half), logits(rounded), rtol=1e-5, atol=1e-5)


def test_other_programs_refuse_packed_weights_instead_of_misreading_them(folder, tmp_path):
    from transformers import MptForCausalLM

    save_packed(folder, tmp_path / "q", 8)
    with pytest.raises(
        ValueError, match=r"packed in fewer bits.*take the model that it was made of"
    ):
        load_model(tmp_path / "q")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        MptForCausalLM.from_pretrained(tmp_path / "q")


def test_mistakes_are_named_and_leave_nothing_behind(folder, tmp_path):
    save_packed(folder, tmp_path / "q", 8)
    with pytest.raises(ValueError, match="weights of 8 bits, and 4 are asked for"):
        load(tmp_path / "q", 4)
    with pytest.raises(ValueError, match="has packed weights already"):
        save_packed(tmp_path / "q", tmp_path / "again", 4)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][4, 4] = float("inf")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight: a weight is infinite"):
        save_packed(folder, tmp_path / "inf", 8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "q"]


def test_a_damaged_tensor_is_named(folder, tmp_path):
    save_packed(folder, tmp_path / "q", 8)
    file = tmp_path / "q" / "packed.safetensors"
    weights = load_file(file)
    scale = weights.pop("transformer.blocks.1.attn.Wqkv.scale")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"lacks transformer\.blocks\.1\.attn\.Wqkv\.scale"):
        load(tmp_path / "q")
    save_file(weights | {"transformer.blocks.1.attn.Wqkv.scale": scale[1:]}, file)
    with pytest.raises(ValueError, match=r"Wqkv\.scale has the shape \(383,\)"):
        load(tmp_path / "q")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"packed\.safetensors is damaged"):
        load(tmp_path / "q")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "has the quantization_config {'quant"),
        ({"quantization_config": {"quant_method": "mptbook"}}, "bits are 8 or 4, and groups of 64"),
        (
            {"quantization_config": {"quant_method": "mptbook", "bits": "8", "group": 64}},
            "bits are 8 or 4, and groups of 64; fetch or write the directory again",
        ),
        (
            {"quantization_config": {"quant_method": "mptbook", "bits": 4, "group": 32}},
            "bits are 8 or 4, and groups of 64",
        ),
        ({"d_model": "wide"}, r"config\.json: d_model is 'wide'; it must be a whole number"),
        ({"expansion_ratio": None}, r"config\.json: expansion_ratio is None; it must be float"),
        ({"attn_config": {"alibi": "yes"}}, r"config\.json: alibi is 'yes'; it must be bool"),
    ],
)
def test_a_damaged_description_of_packed_weights_is_named(folder, tmp_path, about, message):
    save_packed(folder, tmp_path / "q", 8)
    file = tmp_path / "q" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "q")


@pytest.mark.parametrize(
    ("part", "dtype"), [("packed", torch.float32), ("packed", torch.uint8), ("scale", torch.half)]
)
def test_packed_weights_of_another_dtype_are_named(folder, tmp_path, part, dtype):
    save_packed(folder, tmp_path / "q", 8)
    weights = load_file(tmp_path / "q" / "packed.safetensors")
    name = f"transformer.blocks.1.attn.Wqkv.{part}"
    weights[name] = weights[name].to(dtype)
    save_file(weights, tmp_path / "q" / "packed.safetensors")
    with pytest.raises(ValueError, match=rf"Wqkv\.{part} is of {dtype} in .*, and weights of 8 bi"):
        load(tmp_path / "q")


def test_a_quantization_of_null_is_none(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    assert not is_packed_directory(folder)
    assert torch.equal(logits(load(folder)), logits(load_model(folder)))


@pytest.mark.parametrize("name", ["transformer.wte.packed", "transformer.norm_f.weight"])
def test_what_is_written_is_read_back(folder, tmp_path, monkeypatch, name):
    kept, slipped, write = {}, {}, load_module.write_tensors

    def slips(tensors, file):
        write(tensors | {name: tensors[name] // 2}, file)

    save_packed(folder, tmp_path / "q", 8, kept.__setitem__)
    assert kept["transformer.wte.weight"] < 0.01
    monkeypatch.setattr(load_module, "write_tensors", slips)
    if name.endswith("packed"):
        save_packed(folder, tmp_path / "slipped", 8, slipped.__setitem__)
        assert slipped.pop("transformer.wte.weight") > 0.4
        assert slipped.items() < kept.items()
        return
    with pytest.raises(ValueError, match=f"the new files hold another {name} than the model"):
        save_packed(folder, tmp_path / "slipped", 8)
    assert not (tmp_path / "slipped").exists()


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rest", [torch.bfloat16, torch.float32, torch.float16])
def test_weights_of_several_dtypes_are_each_what_they_are(folder, first, rest):
    name = "transformer.wte.weight"
    weights = {name: weight.to(rest) for name, weight in load_file(folder / FILE).items()}
    whole = {name: load_file(folder / FILE)[name].to(first)}  # first in the file, too
    (folder / FILE).unlink()
    torch.save(
        whole | {n: w for n, w in weights.items() if n != name}, folder / "pytorch_model.bin"
    )
    found, expected = load(folder), load_model(folder, torch.float32)
    if first == rest == torch.float16:
        found = found.float()
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)
    (text,) = generate(load(folder), Tokenizer.load(folder), "the", max_new_tokens=5)
    assert text == generate(expected, Tokenizer.load(folder), "the", max_new_tokens=5)[0]


def test_a_file_without_weights_is_named(folder):
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the files in .*/m hold no weight; fetch them again"):
        load(folder)


def load_with(bytes_, folder, bits, send):
    """Load a model in a process that may take so many bytes more than it has, mapped files in."""
    torch.set_num_threads(1)  # the stacks of others would count
    quantize_module.PIECE = 2**18
    load(folder.parent / "small", bits)  # what libraries take at the first call
    limit = process_bytes("VmData") + bytes_
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        send.send(weight_bytes(load(folder, bits)))
    except (MemoryError, RuntimeError) as error:
        send.send(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts memory as Linux does")
@pytest.mark.parametrize(("bits", "packed"), [(8, False), (8, True), (4, True)])
def test_loading_takes_the_packed_model_and_a_piece(tmp_path, bits, packed):
    wide, small = tmp_path / "wide", tmp_path / "small"
    # So large that what the allocator leaves free, some megabytes at random, is little beside it.
    for folder, width, vocabulary in ((wide, 512, 80_000), (small, 64, 100)):
        save_model(MPT(CONFIG.replace(d_model=width, vocab_size=vocabulary)), tmp_path / "whole")
        if packed:
            save_packed(tmp_path / "whole", folder, bits)
        else:
            (tmp_path / "whole").rename(folder)
    size = weight_bytes(load(wide, bits))
    mapped = sum(file.stat().st_size for file in wide.glob("*.safetensors"))
    found = []
    for room in (mapped + 1.5 * size, mapped + 0.8 * size):
        receive, send = (context := get_context("spawn")).Pipe(duplex=False)
        process = context.Process(target=load_with, args=(int(room), wide, bits, send))
        process.start()
        send.close()  # or a process that dies would be waited for
        found.append(receive.recv())
        process.join()
    assert found[0] == size
    assert "memory" in found[1]  # so it was the limit that held
