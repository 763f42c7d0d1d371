"""What a checkpoint holds, which damage is noticed, and what a resume refuses."""

import json
import os
import subprocess

import pytest
import torch

from mptbook.__main__ import main
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.lion import Lion
from mptbook.tokenizer.bpe import train_bpe
from mptbook.train.checkpoint import Writer, checkpoints, damage, write_checkpoint
from mptbook.train.snapshot import FORMAT, Snapshot, consolidate, load_snapshot

CONFIG = MPTConfig(d_model=12, n_heads=2, n_layers=1, vocab_size=300, max_seq_len=9)
MADE_WITH = {"batch_tokens": 64, "tokenizer": "abc"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the hare ran over the hill"] * 9, 285)


def trained(optimizer_class=Lion, steps=2):
    torch.manual_seed(0)
    model = MPT(CONFIG)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model.loss(torch.arange(9)[None], torch.arange(1, 10)[None]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def snapshot(model, optimizer, tokenizer, step=7):
    guard = {"refused": 0, "losses": [1 / 3]}
    return Snapshot.take(step, model, optimizer, tokenizer, guard=guard, made_with=MADE_WITH)


@pytest.fixture
def saved(tokenizer, tmp_path):
    return write_checkpoint(snapshot(*trained(), tokenizer), tmp_path, keep=2)


@pytest.mark.parametrize("optimizer_class", [Lion, torch.optim.AdamW])
def test_what_was_saved_comes_back_bit_for_bit(tokenizer, tmp_path, optimizer_class):
    model, optimizer = trained(optimizer_class)
    path = write_checkpoint(snapshot(model, optimizer, tokenizer), tmp_path, keep=2)
    expected = torch.rand(3)
    other, restored = trained(optimizer_class, steps=0)
    torch.manual_seed(5)
    state = load_snapshot(path, other, restored, MADE_WITH)
    # the random state is that of the snapshot: nothing was drawn before `expected`
    assert torch.equal(torch.rand(3), expected)
    assert (state["step"], state["guard"]["losses"]) == (7, [1 / 3])
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert optimizer.state[a].keys() == restored.state[b].keys()
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, restored.state[b][key])


def test_a_snapshot_is_not_touched_by_later_steps(tokenizer, tmp_path):
    model, optimizer = trained()
    taken = snapshot(model, optimizer, tokenizer)
    before = {name: value.clone() for name, value in taken.tensors.items()}
    weights = {name: value.clone() for name, value in taken.weights.items()}
    model.loss(torch.arange(9)[None], torch.arange(1, 10)[None]).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in taken.tensors.items())
    for name, value in taken.weights.items():
        assert torch.equal(value, weights[name])
        assert not torch.equal(value, model.state_dict()[name])


def test_a_checkpoint_is_a_model_directory_and_holds_no_pickle(saved):
    from mptbook import Tokenizer, load_model

    assert torch.equal(load_model(saved).head, trained()[0].head)
    assert len(Tokenizer.load(saved)) == 285
    assert {file.suffix for file in saved.iterdir()} == {".json", ".safetensors", ""}


def test_the_digests_are_those_of_sha256sum(saved):
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=saved, capture_output=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(b": OK") == len(list(saved.iterdir())) - 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flipped bit", "cut short", "missing"])
def test_damage_to_any_file_is_named(saved, name, how):
    assert damage(saved) == ""
    file = saved / name
    if how == "flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
    elif how == "cut short":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    expected = "is missing" if how == "missing" else "is not as it was written"
    assert damage(saved) == f"{name} {expected}"


def test_every_flipped_bit_of_the_digests_is_noticed(saved):
    sums = saved / "SHA256SUMS"
    content = sums.read_bytes()
    for at in range(len(content)):
        for bit in (0, 3, 7):
            spoiled = bytearray(content)
            spoiled[at] ^= 1 << bit
            sums.write_bytes(spoiled)
            assert damage(saved), (at, bit)
    for length in (0, 40, len(content.splitlines(keepends=True)[0])):
        sums.write_bytes(content[:length])
        assert damage(saved), length


def test_a_file_that_nobody_vouches_for_is_noticed(saved):
    (saved / ".DS_Store").write_text("left by a file browser")
    assert damage(saved) == ""
    (saved / "model-00001-of-00002.safetensors").write_text("of another model")
    assert damage(saved) == "SHA256SUMS lacks model-00001-of-00002.safetensors"


def test_only_the_newest_are_kept(tokenizer, tmp_path):
    for step in (1, 5, 1_000_000, 30):
        write_checkpoint(snapshot(*trained(), tokenizer, step=step), tmp_path, keep=2)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-000030", "step-1000000"]


def test_what_a_killed_process_left_is_removed(tokenizer, tmp_path):
    for name in ("partial-000004", ".partial-000004-x1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    write_checkpoint(snapshot(*trained(), tokenizer), tmp_path, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_the_writer_tells_each_outcome_once(tokenizer, tmp_path):
    model, optimizer = trained()
    with Writer(tmp_path, keep=2) as writer:
        assert list(writer.outcomes(wait=True)) == []
        writer.write(snapshot(model, optimizer, tokenizer))
        assert list(writer.outcomes(wait=True)) == [(7, tmp_path / "step-000007")]
        assert list(writer.outcomes(wait=True)) == []


def test_a_failed_write_is_told_and_takes_no_room(tokenizer, tmp_path, monkeypatch):
    model, optimizer = trained()
    write_checkpoint(snapshot(model, optimizer, tokenizer), tmp_path, keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mptbook.train.snapshot.write_tensors", full)
    with Writer(tmp_path, keep=2) as writer:
        writer.write(snapshot(model, optimizer, tokenizer, step=9))
        ((step, error),) = writer.outcomes(wait=True)
    assert (step, error.errno) == (9, 28)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def assert_refused(saved, message, config=CONFIG, made_with=MADE_WITH):
    torch.manual_seed(1)
    model = MPT(config)
    optimizer = Lion(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_snapshot(saved, model, optimizer, made_with)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_a_model_of_another_shape_is_refused_by_name(saved):
    other = CONFIG.replace(n_layers=2)
    assert_refused(saved, r"another shape \(n_layers 1 and not 2\)", config=other)


@pytest.mark.parametrize(("name", "value"), [("batch_tokens", 128), ("tokenizer", "abd")])
def test_what_the_checkpoint_was_made_with_must_be_the_same(saved, name, value):
    message = f"was made with {name}={MADE_WITH[name]} and not {value}; resume with the settings"
    assert_refused(saved, message, made_with=MADE_WITH | {name: value})


def test_a_newer_format_is_refused(saved):
    state = json.loads((saved / "state.json").read_text()) | {"format": FORMAT + 1}
    (saved / "state.json").write_text(json.dumps(state))
    assert_refused(saved, f"has format {FORMAT + 1}, this version of mptbook reads format {FORMAT}")


def test_a_checkpoint_moved_elsewhere_is_as_good(saved, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = saved.rename(tmp_path / "elsewhere" / saved.name)
    assert damage(moved) == ""
    assert load_snapshot(moved, *trained(steps=0), MADE_WITH)["step"] == 7


def test_a_model_directory_is_made_of_whole_checkpoints_with_all_weights(tokenizer, tmp_path):
    path = write_checkpoint(snapshot(*trained(), tokenizer), tmp_path, keep=1)
    words = ["consolidate", str(path), "--out", str(tmp_path / "model")]
    assert main(words) == 0
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xx")
    words[-1] = str(tmp_path / "damaged")
    assert main(words) == 2
    assert not (tmp_path / "damaged").exists()
    state = json.loads((path / "state.json").read_text())
    state["made_with"]["lora"] = {"rank": 4}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="has adapters only"):
        consolidate(path, tmp_path / "damaged")
