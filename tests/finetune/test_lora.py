"""Adapters: trained, written, read by peft, merged."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mptbook import MPTForCausalLM, load_model
from mptbook.finetune.lora import (
    LAYERS,
    Lora,
    adapter_weights,
    add_adapters,
    initialise_adapters,
    load_adapters,
    merge,
    write_adapters,
)
from mptbook.finetune.sft import finetune


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def trained(chosen, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    finetune(chosen(out, lora=Lora(rank=3, alpha=7)))
    return out


def with_adapters(base, seed=1, **changes):
    """A model with adapters that do something."""
    model = load_model(base)
    add_adapters(model, Lora(rank=3, alpha=7, **changes))
    torch.manual_seed(seed)
    initialise_adapters(model, seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def test_adapters_change_nothing_at_first(base, ids):
    model = load_model(base)
    before = model(ids)
    add_adapters(model, Lora(rank=3))
    initialise_adapters(model)
    assert torch.equal(model(ids), before)


def test_merged_equals_unmerged(base, ids):
    model = with_adapters(base)
    unmerged = model(ids)
    assert (unmerged - load_model(base)(ids)).abs().max() > 0.1
    merge(model)
    torch.testing.assert_close(model(ids), unmerged, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == load_model(base).state_dict().keys()
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_adapter_is_a_low_rank_sum_by_hand(base):
    model = with_adapters(base, layers=["up_proj"])
    layer = model.transformer.blocks[1].ffn.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.get_base_layer().weight + 7 / 3 * b @ a
    merge(model)
    torch.testing.assert_close(model.transformer.blocks[1].ffn.up_proj.weight, expected)


def test_written_adapters_are_read_again_and_by_peft(base, ids, tmp_path):
    model = with_adapters(base)
    write_adapters(model, adapter_weights(model), tmp_path / "adapter", str(base))
    again = load_model(base)
    load_adapters(again, tmp_path / "adapter")
    assert torch.equal(again(ids), model(ids))
    theirs = PeftModel.from_pretrained(MPTForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids), rtol=0, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, model(ids), rtol=0, atol=1e-5)


def test_adapters_made_by_peft_are_read(base, ids, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["Wqkv", "down_proj"], init_lora_weights=False)
    theirs = get_peft_model(MPTForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(base)
    load_adapters(model, tmp_path)
    torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_run_trains_adapters_alone_and_merges_them(trained, base, ids):
    adapters = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * len(LAYERS)
    assert all(weight.abs().max() > 0 for weight in adapters.values())
    unmerged = load_model(base)
    load_adapters(unmerged, trained / "adapter")
    torch.testing.assert_close(load_model(trained)(ids), unmerged(ids), rtol=0, atol=1e-5)
    before, after = load_model(base).state_dict(), load_model(trained).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if not any(layer in name for layer in LAYERS)}


def test_a_checkpoint_of_adapters_holds_no_frozen_weight(trained):
    saved = load_file(trained / "step-000006" / "model.safetensors")
    assert all("lora_" in name for name in saved)
    state = load_file(trained / "step-000006" / "optimizer.safetensors")
    assert all("lora_" in name or name.startswith("random:") for name in state)


def test_a_resumed_run_of_adapters_ends_bit_identical(trained, chosen, tmp_path):
    part = tmp_path / "part"
    finetune(chosen(part, lora=Lora(rank=3, alpha=7), until=2))
    assert not (part / "model").exists()
    finetune(chosen(part, lora=Lora(rank=3, alpha=7), resume=True))
    for name, weight in load_file(trained / "model" / "model.safetensors").items():
        assert torch.equal(load_file(part / "model" / "model.safetensors")[name], weight), name


def test_the_command_merges_what_a_run_wrote(trained, tmp_path, capsys):
    from mptbook.__main__ import main

    assert main(["merge", str(trained / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json"):
        merged, expected = (
            (folder / name).read_bytes() for folder in (tmp_path / "merged", trained / "model")
        )
        assert merged == expected, name
    kept = (trained / "model" / "model.safetensors").read_bytes()
    assert main(["merge", str(trained / "adapter"), "--out", str(trained / "model")]) == 2
    assert "is there already; choose another folder" in capsys.readouterr().err
    assert (trained / "model" / "model.safetensors").read_bytes() == kept
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "other")]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"lora.layers has wte; a block has Wqkv, out_proj"):
        add_adapters(load_model(base), Lora(rank=2, layers=["wte"]))
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load_adapters(load_model(base), tmp_path)
    model = with_adapters(base)
    with pytest.raises(ValueError, match="has adapters already; merge them first"):
        add_adapters(model, Lora(rank=2))
    write_adapters(model, adapter_weights(model), tmp_path, "theirs")
    small = load_model(base, n_layers=2)
    merge(small)
    small.transformer.blocks = small.transformer.blocks[:1]
    with pytest.raises(ValueError, match="no place in the model; the adapters belong to theirs"):
        load_adapters(small, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"peft_type": "LOHA"}))
    with pytest.raises(ValueError, match="adapters of the kind LOHA, not LORA"):
        load_adapters(load_model(base), tmp_path)
