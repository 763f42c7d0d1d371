import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from mptbook.directory import fresh_directory, load_model, save_model
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import read_weights

SHAPE = MPTConfig(d_model=42, n_heads=6, n_layers=2, vocab_size=101, max_seq_len=23)


def build(config=SHAPE, dtype=torch.float32):
    torch.manual_seed(0)
    return MPT(config).to(dtype)


def assert_same(actual, expected):
    assert actual.config == expected.config
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype, name
        assert torch.equal(actual[name], weight), name


def small_tokenizer():
    words = {word: i for i, word in enumerate(["<|endoftext|>", "the", "cat", "sat"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend)


@pytest.fixture
def saved(tmp_path):
    save_model(build(), tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def rewrite(folder, change):
    """Replace the weights by what `change` makes of them."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights), file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "no_bias": False, "qk_ln": True, "alibi": False},
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "alibi_bias_max": 16},
    ],
    ids=["mpt", "all the extras", "grouped"],
)
def test_a_model_survives_its_directory(tmp_path, changes, dtype):
    model = build(SHAPE.replace(**changes), dtype)
    save_model(model, tmp_path / "m")
    assert_same(load_model(tmp_path / "m"), model)


def test_a_loaded_model_answers_like_the_saved_one(saved):
    ids = torch.arange(17)[None]
    model = load_model(str(saved))
    assert not model.training
    assert torch.equal(model(ids), build()(ids))


def test_the_files_are_those_of_hugging_face(tmp_path):
    save_model(build(dtype=torch.bfloat16), tmp_path / "m", small_tokenizer())
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mpt", ["MPTForCausalLM"])
    assert config["dtype"] == "bfloat16"


def test_a_dtype_can_be_asked_for(saved):
    model = load_model(saved, dtype=torch.bfloat16)
    expected = build().to(torch.bfloat16)
    assert_same(model, expected)
    assert model.slopes.dtype == torch.float32


def test_each_tensor_keeps_its_own_dtype(saved):
    rewrite(saved, lambda w: w | {"transformer.norm_f.weight": torch.ones(42).bfloat16()})
    model = load_model(saved)
    assert model.transformer.norm_f.weight.dtype == torch.bfloat16
    assert model.transformer.wte.weight.dtype == torch.float32


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_shards_hold_at_most_what_they_may(tmp_path, limit):
    model = build()
    save_model(model, tmp_path / "m", max_shard_bytes=limit)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    for file in files:
        sizes = [w.nbytes for w in load_file(file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert len(files) == {1: len(model.state_dict()), 20_000: 8, 10**9: 1}[limit]
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (len(files) > 1)
    assert_same(load_model(tmp_path / "m"), model)


def as_bin(folder, prefix="", shards=1):
    """Turn the weights into PyTorch files, as older releases have them."""
    file = folder / "model.safetensors"
    weights = {prefix + name: weight for name, weight in load_file(file).items()}
    file.unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = list(weights)
    where = {}
    for shard in range(shards):
        part = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        where |= dict.fromkeys(names[shard::shards], part)
        torch.save({name: weights[name] for name in names[shard::shards]}, folder / part)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["plain", "composer"])
def test_pickled_weights_are_read(saved, prefix, shards):
    as_bin(saved, prefix, shards)
    assert_same(load_model(saved), build())


def test_pickled_weights_may_lie_transposed(saved):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    matrices = {
        name: weight.T.contiguous().T for name, weight in weights.items() if weight.dim() > 1
    }
    torch.save(weights | matrices, saved / "pytorch_model.bin")
    model = load_model(saved)
    assert_same(model, build())
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_a_repeated_tied_head_is_passed_over(saved):
    rewrite(saved, lambda w: w | {"lm_head.weight": w["transformer.wte.weight"].clone()})
    assert_same(load_model(saved), build())
    assert_same(load_model(saved, torch.bfloat16), build().bfloat16())


def test_a_checkpoint_of_transformers_own_mpt_is_read(tmp_path):
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    attn = {"clip_qkv": 0.7, "softmax_scale": 0.4}
    config = MptConfig(d_model=42, n_heads=6, n_layers=2, vocab_size=101, attn_config=attn)
    theirs = MptForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert model.config.attn_config.clip_qkv == 0.7
    ids = torch.arange(17)[None]
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_directory_of_ours_is_read_by_transformers_own_mpt(saved):
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(**json.loads((saved / "config.json").read_text()))
    theirs, info = MptForCausalLM.from_pretrained(saved, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(17)[None]
    torch.testing.assert_close(theirs.eval()(ids).logits, build()(ids), rtol=1e-4, atol=1e-4)


def test_a_run_directory_means_its_model(tmp_path):
    save_model(build(), tmp_path / "run" / "model")
    (tmp_path / "run" / "run.toml").touch()
    assert_same(load_model(tmp_path / "run"), build())


PEAK = """
import sys, torch
from mptbook.directory import load_model
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT

with torch.device("meta"):  # what PyTorch imports for this is not ours to count
    MPT(MPTConfig(d_model=8, n_heads=1, n_layers=1))

def anonymous(key):
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

before, peak = anonymous("Anonymous:"), 0
kept = torch.nn.Parameter

class Watched(kept):
    def __new__(cls, data):
        global peak
        peak = max(peak, anonymous("Anonymous:"))
        return kept(data)

torch.nn.Parameter = Watched
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
sizes = [p.nbytes for p in model.parameters()]
print(peak - before - sum(sizes), max(sizes), sum(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("kind", "dtype"), [("safetensors", "float32"), ("bin", "bfloat16")])
def test_loading_holds_no_more_than_the_model_and_one_tensor(tmp_path, kind, dtype):
    save_model(build(SHAPE.replace(d_model=504, n_layers=6, vocab_size=2000)), tmp_path / "m")
    if kind == "bin":
        as_bin(tmp_path / "m")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "m"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    over, largest, total = map(int, done.stdout.split())
    assert total > 8 * largest  # else the claim would be an easy one
    assert over < largest + 4 * 2**20  # and what the allocator and the interpreter need


def test_saving_replaces_a_model_and_leaves_nothing_beside_it(saved):
    other = build(SHAPE.replace(n_layers=1))
    save_model(other, saved)
    assert_same(load_model(saved), other)
    assert [file.name for file in saved.parent.iterdir()] == ["m"]


def test_saving_that_fails_leaves_the_old_model(saved, monkeypatch):
    def fails(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("mptbook.weights.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_model(build(SHAPE.replace(n_layers=1)), saved)
    assert_same(load_model(saved), build())
    assert [file.name for file in saved.parent.iterdir()] == ["m"]


def test_a_rename_that_fails_brings_the_old_model_back(saved, monkeypatch):
    rename = Path.rename

    def fails(self, target):
        if self.name == "fresh":
            raise PermissionError("not today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(PermissionError, match="not today"):
        save_model(build(SHAPE.replace(n_layers=1)), saved)
    assert_same(load_model(saved), build())


def test_a_loaded_model_does_not_depend_on_its_file(saved):
    model = load_model(saved)
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * (saved / "model.safetensors").stat().st_size)
    assert_same(model, build())


def test_what_fails_takes_the_folders_along_that_it_made(tmp_path):
    (tmp_path / "old").mkdir()
    out = tmp_path / "old" / "new" / "newer" / "m"

    def fail():
        with fresh_directory(out) as fresh:
            (fresh / "half").write_text("of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any((tmp_path / "old").iterdir())


def test_saving_into_an_empty_folder_is_allowed(tmp_path):
    save_model(build(), tmp_path)
    assert_same(load_model(tmp_path), build())


def test_saving_never_takes_the_place_of_anything_else(tmp_path, saved):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=r"notes is not a model directory \(no config.json\); cho"):
        save_model(build(), tmp_path / "notes")
    (saved / "diary.txt").touch()
    with pytest.raises(ValueError, match=r"m holds diary.txt, which is no part .*another folder"):
        save_model(build(), saved)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give the folder"):
        save_model(build(), tmp_path / "file")
    assert (saved / "diary.txt").exists()


def drop(*names):
    return lambda weights: {name: w for name, w in weights.items() if name not in names}


def put(name, weight):
    return lambda weights: weights | {name: weight}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("transformer.norm_f.weight"),
            r"m lacks transformer.norm_f.weight of shape \(42,\); the files are incomplete",
        ),
        (
            drop("transformer.norm_f.weight", "transformer.wte.weight"),
            r"lacks transformer.wte.weight of shape \(101, 42\) and 1 more",
        ),
        (
            put("transformer.blocks.2.norm_1.weight", torch.ones(42)),
            r"holds transformer.blocks.2.norm_1.weight of shape \(42,\), which has no place",
        ),
        (
            put("transformer.wte.weight", torch.ones(96, 42)),
            r"transformer.wte.weight has the shape \(96, 42\) in .*safetensors, but \(101, 42\)",
        ),
        (
            put("lm_head.weight", torch.ones(101, 42)),
            "lm_head.weight that differs from transformer.wte.weight, .* tie_word_embeddings: fal",
        ),
        (
            put("lm_head.weight", torch.ones(96, 42)),
            "lm_head.weight that differs from transformer.wte.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_a_weight_that_the_file_alone_asks_for_is_named(saved):
    edit(saved, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks lm_head.weight of shape \(101, 42\)"):
        load_model(saved)


def test_a_truncated_file_is_named(saved):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"m/model.safetensors is damaged .* write it again"):
        load_model(saved)


def test_a_missing_shard_is_named(tmp_path):
    save_model(build(), tmp_path / "m", max_shard_bytes=40_000)
    next((tmp_path / "m").glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-\d+.safetensors is missing, but"):
        load_model(tmp_path / "m")


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_a_pickle_may_hold_parameters_and_be_of_the_old_format(saved):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    for how in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(parameters, saved / "pytorch_model.bin", **how)
        assert_same(load_model(saved), build())
        found = read_weights(saved, build())
        assert not any(weight.requires_grad for _, weight in found)


@pytest.mark.parametrize(
    "content",
    [
        {3: torch.ones(2)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
    ],
)
def test_tensors_that_are_no_weights_are_refused(saved, content):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a plain dictionary of tensors"):
        load_model(saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_other_dtypes_are_refused(saved, dtype):
    rewrite(saved, lambda w: {name: weight.to(dtype) for name, weight in w.items()})
    with pytest.raises(ValueError, match=f"is of {dtype} in .*; weights are float32, bfloat16"):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion_ratio": float("inf")}, "expansion_ratio is inf; it must be from 0 on, and be"),
        ({"expansion_ratio": -1}, "expansion_ratio is -1; it must be from 0 on"),
        ({"expansion_ratio": 0}, "expansion_ratio is 0; an MLP needs a width"),
        ({"d_model": 6 * 2**62}, "it must be from 0 on, and below 2.*31"),
        ({"layer_norm_epsilon": float("nan")}, "norm_eps is nan; it must be from 0 on"),
        ({"norm_eps": 0.5, "layer_norm_epsilon": 1e-5}, "norm_eps is 0.5, but layer_norm_epsilon"),
        (
            {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": -2}},
            "kv_n_heads is -2; it must be from 0 on",
        ),
    ],
)
def test_numbers_that_cannot_be_meant_are_named(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load_model(saved)


def test_a_file_without_bottom_is_named(saved):
    (saved / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(saved)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"wte": 3}}])
def test_an_index_that_names_no_files_is_named(saved, index):
    (saved / "model.safetensors").rename(saved / "model-00001-of-00001.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map of names and files"):
        load_model(saved)


@pytest.mark.parametrize("content", [{"weights": Bomb()}, {"state": {"model": {}}}, [1]])
def test_a_pickle_that_holds_more_than_tensors_is_refused(saved, capsys, content):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a plain dictionary of tensors"):
        load_model(saved)
    assert "boom" not in capsys.readouterr().out


def test_a_config_that_cannot_be_read_is_named(saved):
    edit(saved, n_layer=3)
    with pytest.raises(ValueError, match=r"m/config.json: n_layer is not .* did you mean n_layers"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"m/config.json is not valid JSON: Expecting"):
        load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"m/config.json holds a list; it should be a JSON object"):
        load_model(saved)


def test_what_is_missing_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a model directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no config.json; .* has it in model/"):
        load_model(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither of model.safetensors and pytorch_model"):
        load_model(saved)


def test_a_hub_name_is_fetched_safetensors_first(saved, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(load_model("some-org/mpt-9b"), build())
    as_bin(saved)
    assert_same(load_model("some-org/mpt-9b"), build())
    assert asked == [
        ("some-org/mpt-9b", ["*.json", "*.jinja", "*.safetensors"]),
        ("some-org/mpt-9b", ["*.json", "*.jinja", "*.safetensors"]),
        ("some-org/mpt-9b", ["*.json", "*.jinja", "*.bin"]),
    ]


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    def snapshot_download(*_args, **_kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"runs/a is no folder here, .*no route to host$"):
        load_model("runs/a")
