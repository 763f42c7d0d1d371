import configparser

import numpy as np
import pytest
import torch
from exported_model import make

from mptbook import load_model
from mptbook.export import fastertransformer


def test_two_gpus_share_the_heads_and_the_width_of_an_mlp(tmp_path):
    folder = make(tmp_path / "m")
    fastertransformer.write(folder, tmp_path, "fp32", gpus=2)
    home = tmp_path / "2-gpu"
    block = load_model(folder).transformer.blocks[1]

    def numbers(name):
        return torch.from_numpy(np.fromfile(home / f"model.layers.1.{name}.bin", np.float32))

    # The second GPU has the second half of the heads: rows 48 to 95 of each of q, k and v.
    q, k, v = block.attn.Wqkv.weight.chunk(3)
    found = numbers("attention.query_key_value.weight.1").reshape(96, 3, 48)
    for place, whole in enumerate((q, k, v)):
        assert torch.equal(found[:, place], whole[48:].T)
    found = numbers("attention.dense.weight.1").reshape(48, 96)
    assert torch.equal(found, block.attn.out_proj.weight[:, 48:].T)
    found = numbers("mlp.dense_h_to_4h.weight.0").reshape(96, 192)
    assert torch.equal(found, block.ffn.up_proj.weight[:192].T)
    found = numbers("mlp.dense_4h_to_h.weight.0").reshape(192, 96)
    assert torch.equal(found, block.ffn.down_proj.weight[:, :192].T)
    # Biases, which such a model has none of, are read in any case.
    sizes = {
        "attention.query_key_value.bias.1": 3 * 48,
        "attention.dense.bias": 96,
        "mlp.dense_h_to_4h.bias.0": 192,
        "mlp.dense_4h_to_h.bias": 96,
        "input_layernorm.bias": 96,
        "post_attention_layernorm.bias": 96,
    }
    for name, size in sizes.items():
        assert torch.equal(numbers(name), torch.zeros(size))
    ini = configparser.ConfigParser()
    ini.read(home / "config.ini")
    assert ini["gpt"]["use_attention_linear_bias"] == "True"
    assert int(ini["gpt"]["size_per_head"]) == 16
    assert fastertransformer.read_back(folder, tmp_path) == 0


@pytest.mark.parametrize("fields", [{}, {"no_bias": False, "tie_word_embeddings": False}])
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 0), ("fp16", 2e-3)])
def test_what_is_read_back_is_what_was_written(fields, dtype, most, tmp_path):
    folder = make(tmp_path / "m", **fields)
    fastertransformer.write(folder, tmp_path, dtype, gpus=3)
    assert fastertransformer.read_back(folder, tmp_path) <= most
    names = {file.name for file in (tmp_path / "3-gpu").iterdir()}
    of_a_block = 4 * 3 + 2 * 3 + 2 + 4  # weights, shared biases, whole biases, norms
    whole = {"config.ini", "model.wte.bin"}
    whole |= {"model.final_layernorm.weight.bin", "model.final_layernorm.bias.bin"}
    whole |= {"model.lm_head.weight.bin"} if fields else set()
    assert {name for name in names if ".layers." not in name} == whole
    assert len(names - whole) == 2 * of_a_block


def test_a_damaged_file_is_noticed(tmp_path):
    folder = make(tmp_path / "m")
    fastertransformer.write(folder, tmp_path, "fp32")
    file = tmp_path / "1-gpu" / "model.layers.0.mlp.dense_h_to_4h.weight.0.bin"
    numbers = np.fromfile(file, np.float32)
    numbers[5] += 0.25
    file.write_bytes(numbers.tobytes())
    assert fastertransformer.read_back(folder, tmp_path) == pytest.approx(0.25, rel=1e-3)
    file.write_bytes(numbers[:-1].tobytes())
    with pytest.raises(ValueError, match="holds 36863 numbers, its weight has 36864"):
        fastertransformer.read_back(folder, tmp_path)


def test_gpus_that_cannot_share_the_heads_are_refused(tmp_path):
    folder = make(tmp_path / "m")
    with pytest.raises(ValueError, match="4 GPUs cannot share n_heads=6"):
        fastertransformer.write(folder, tmp_path, "fp16", gpus=4)
