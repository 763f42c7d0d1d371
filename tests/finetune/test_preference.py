"""Whole runs of `mptbook prefer` on a tiny model that is to like one word better."""

import json
import random
import sys

import pytest
import torch

from mptbook.__main__ import main
from mptbook.directory import load_model, save_model
from mptbook.finetune import preference
from mptbook.finetune.lora import Lora
from mptbook.finetune.preference import Liking, Preference, prefer
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

WORDS = "hare ran miles over the hill and far away from here to there".split()


def sentence(chance, kind):
    return " ".join([kind, *chance.sample(WORDS, 3)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "start"
    torch.manual_seed(3)
    texts = [" ".join(["yes no", *WORDS]), "<|im_start|>user assistant<|im_end|>\n"] * 9
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, max_seq_len=90, vocab_size=320)
    save_model(MPT(config), folder, train_bpe(texts, 320))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of answers with the same words the one with `yes` is liked better."""
    file, chance = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random.Random(1)
    rows = []
    for _ in range(60):
        rest = sentence(chance, "")
        row = {"prompt": sentence(chance, "the"), "chosen": f"yes{rest}", "rejected": f"no{rest}"}
        rows.append(json.dumps(row) + "\n")
    file.write_text("".join(rows))
    return file


@pytest.fixture
def settings(model, pairs, tmp_path):
    how = {"template": "chatml", "heldout": 0.3, "batch_pairs": 6, "micro_pairs": 3, "lr": 3e-3}
    how["precision"] = "fp32"
    return Preference(model=str(model), source=str(pairs), out=tmp_path / "run", epochs=2, **how)


def events(run, kind):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_what_is_liked_in_some_prompts_is_learned_for_others(settings, capfd):
    assert prefer(settings) == settings.out / "model"
    first, *_, last = events(settings.out, "step")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: nothing is learned yet
    assert last["loss"] < 0.6
    (held,) = events(settings.out, "heldout")
    assert held["accuracy"] == 1
    assert held["chosen"] > held["rejected"]
    captured = capfd.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 3  # pairs, held out, where the model is
    weights = load_model(settings.out).state_dict()
    start = load_model(settings.model).state_dict()
    assert not torch.equal(weights["transformer.wte.weight"], start["transformer.wte.weight"])


def test_adapters_alone_learn_it_too_and_are_merged_at_the_end(settings):
    settings = settings.model_copy(update={"lora": Lora(rank=4), "lr": 3e-2})
    prefer(settings)
    (held,) = events(settings.out, "heldout")
    assert held["accuracy"] > 0.9
    weights = load_model(settings.out).state_dict()  # plain: it would refuse adapters
    start = load_model(settings.model).state_dict()
    changed = {name for name in start if not torch.equal(weights[name], start[name])}
    assert len(changed) == 2 * 4  # layers, and the matrices of each; not the embeddings


def test_the_chat_template_is_in_the_model_directory(settings):
    settings.epochs = 0.1
    prefer(settings)
    assert "<|im_start|>" in (settings.out / "model/chat_template.jinja").read_text()
    settings.model, settings.template = str(settings.out / "model"), ""
    settings.out = settings.out.parent / "again"
    prefer(settings)  # takes the model's own


def test_a_run_that_was_cut_off_ends_as_if_it_was_not(settings, monkeypatch):
    settings.save_every = 4
    prefer(settings)
    whole = load_model(settings.out).state_dict()

    cut = settings.model_copy(update={"out": settings.out.parent / "cut"})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(preference, "save_model", stop)
        context.setattr("mptbook.finetune.trainer.PairLog.step", _interrupt_at(6))
        with pytest.raises(KeyboardInterrupt):
            prefer(cut)
    assert not (cut.out / "model").exists()
    with pytest.raises(FileExistsError, match="is not empty; go on with --resume"):
        prefer(cut)
    with pytest.raises(ValueError, match=r"cut was begun with beta=0\.1, not 0\.2; go on"):
        prefer(cut.model_copy(update={"resume": True, "beta": 0.2}))
    with pytest.raises(ValueError, match=r"was begun with max_tokens=None, not 50; go on"):
        prefer(cut.model_copy(update={"resume": True, "max_tokens": 50}))
    noted = (cut.out / "run.toml").read_text()
    (cut.out / "run.toml").write_text(f"max_tokens = 50\n{noted}")
    with pytest.raises(ValueError, match=r"was begun with max_tokens=50, not None; go on"):
        prefer(cut.model_copy(update={"resume": True}))
    (cut.out / "run.toml").write_text(noted)
    prefer(cut.model_copy(update={"resume": True}))
    assert events(cut.out, "step")[-1]["step"] == events(settings.out, "step")[-1]["step"]
    for name, weight in load_model(cut.out).state_dict().items():
        torch.testing.assert_close(weight, whole[name], atol=0, rtol=0)


def _interrupt_at(last):
    def step(log, step, steps, figures):
        log.event("step", step, **figures)
        if step == last:
            raise KeyboardInterrupt

    return step


def test_a_step_that_is_not_finite_ends_the_run(settings):
    settings.lr = 1e30
    with pytest.raises(ValueError, match=r"step \d+: (loss|grad_norm) is (nan|inf); lower lr=1e"):
        prefer(settings)
    assert not (settings.out / "model").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"micro_pairs": 4}, "micro_pairs=4 does not divide batch_pairs=6; choose one that does"),
        ({"heldout": 0.999}, "heldout=0.999 leaves no pair to learn from; lower it"),
        ({"template": ""}, "has no chat template; give "),
        ({"max_tokens": 3}, "no pair is left: .* are longer than max_tokens=3; allow more"),
        ({"source": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(settings, change, what):
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        prefer(settings.model_copy(update=change))
    assert not settings.out.exists()


def test_another_folder_is_not_written_to(settings):
    settings.out.mkdir()
    (settings.out / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="is not empty; it is not a run"):
        prefer(settings)
    assert [path.name for path in settings.out.iterdir()] == ["thesis.txt"]


def test_without_trl_the_error_says_how_to_get_it(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match=r"pip install 'mptbook\[finetune\]'"):
        prefer(settings)
    assert not settings.out.exists()


def test_a_bad_row_ends_the_command_with_one_line(tmp_path, model, capfd):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    words = ["prefer", "--model", str(model), "--template", "chatml", "--out", str(tmp_path / "r")]
    assert main([*words, "--source", str(tmp_path / "a.jsonl")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "a.jsonl, line 1: it has no chosen" in error
    assert error.count("\n") == 1


def test_a_tie_counts_half():
    reference = torch.zeros(4, 2)
    policy = torch.tensor([[1.0, 0], [0, 1], [2, 2], [3, 1]])
    liking = Liking.of(policy, reference)
    assert liking.accuracy == 2.5 / 4
    assert liking.margin == 0.5
    assert (liking.chosen, liking.rejected) == (1.5, 1.0)


def test_only_pairs_that_the_steps_read_are_scored(settings, capsys):
    prefer(settings.model_copy(update={"steps": 2}))
    assert "12 pairs to learn from" in capsys.readouterr().out
    assert [line["step"] for line in events(settings.out, "step")] == [1, 2]


def test_nothing_is_measured_where_nothing_is_held_out(settings):
    prefer(settings.model_copy(update={"steps": 1, "heldout": 0}))
    assert events(settings.out, "heldout") == []


def test_the_default_pairs_come_with_their_licence(settings, monkeypatch, capsys):
    asked = ({"role": "user", "content": "the hare"},)
    few = [preference.Pair(asked, "yes", "no")] * 6
    monkeypatch.setattr(preference, "default_pairs", lambda *_, **how: few)
    prefer(settings.model_copy(update={"source": "", "steps": 1}))
    assert capsys.readouterr().out.startswith("default pairs: BYU's chitchat, wheel chitchat-")


def test_a_prompt_is_on_one_side_with_all_of_its_pairs(settings):
    asked = [({"role": "user", "content": f"topic {n % 9}"},) for n in range(60)]
    pairs = [preference.Pair(prompt, "yes", "no") for prompt in asked]
    unseen = {pair.prompt[0]["content"] for pair in pairs if preference._unseen(pair, 0.3)}
    assert 0 < len(unseen) < 9
    assert not any(preference._unseen(pair, 0) for pair in pairs)
