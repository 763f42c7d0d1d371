"""Whole finetunings of a tiny model."""

import json
import shutil
import sys

import pytest
import torch
from processes import run as run_words
from processes import torchrun
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from mptbook import Tokenizer, load_model
from mptbook.data.conversations import Mistakes, read_conversations
from mptbook.data.packing import IGNORE
from mptbook.finetune.gather import Layout
from mptbook.finetune.sft import FinetuneRun, finetune
from mptbook.tokenizer.chat import ChatTemplate, encode_messages
from mptbook.train.log import read_log


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(chosen, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finetune(chosen(out, keep=9))
    return out


def test_a_run_learns_to_answer_and_says_what_it_read(unbroken):
    losses = [line["loss"] for line in read_log(unbroken, "step")]
    assert losses[-1] < losses[0] - 0.3
    (gathered,) = read_log(unbroken, "gathered")
    held_out = gathered["heldout"].get("talk", 0)
    assert gathered["conversations"]["talk"] + held_out == 60
    (stage,) = read_log(unbroken, "stage")
    assert stage["row_tokens"] == 160


def test_the_model_directory_has_the_template(unbroken, talk):
    model, template = load_model(unbroken), ChatTemplate.load(unbroken)
    theirs = AutoTokenizer.from_pretrained(unbroken / "model")
    messages = json.loads(talk.read_text().splitlines()[1])["messages"]
    assert theirs.apply_chat_template(messages, tokenize=False) == template.render(messages)
    ids = GenerationConfig.from_pretrained(unbroken / "model").eos_token_id
    assert ids == Tokenizer.load(unbroken / "model").end_of_text
    assert model.config.max_seq_len == 160


def test_a_resumed_run_ends_bit_identical_to_an_unbroken_one(unbroken, chosen, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    for name in ("run.toml", "log.jsonl"):
        shutil.copy(unbroken / name, part)
    shutil.copytree(unbroken / "step-000004", part / "step-000004")
    finetune(chosen(part, keep=9, resume=True))
    for name, weight in weights(unbroken / "model").items():
        assert torch.equal(weights(part / "model")[name], weight), name


def test_other_conversations_do_not_go_on_with_a_run(unbroken, chosen, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    with pytest.raises(ValueError, match="was made with data="):
        finetune(chosen(tmp_path / "run", resume=True, loss_on="last"))


def test_the_loss_of_a_packed_row_is_that_of_its_conversations_alone(chosen, talk, tmp_path):
    run = FinetuneRun.make(chosen(tmp_path, hold_out=False))
    inputs, targets, documents = next(run.feed.batches(0))
    with torch.no_grad():
        together = float(run.model.loss(inputs, targets, documents))
    rows = [json.loads(line)["messages"] for line in talk.read_text().splitlines()]
    alone = {}
    for messages in rows:
        ids, learned = encode_messages(run.template, run.tokenizer, messages, loss_on="all")
        x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
        y = y.masked_fill(~torch.tensor([learned[1:]]), IGNORE)
        with torch.no_grad():
            alone[tuple(ids)] = float(run.model.loss(x, y))
    expected, seen = 0.0, 0
    for row, of_row, last in zip(inputs, documents, targets[:, -1], strict=True):
        for number in of_row.unique():
            ids = tuple(row[of_row == number].tolist())
            # The last token of a full row is a target only.
            found = next((v for k, v in alone.items() if k in (ids, (*ids, int(last)))), None)
            if found is None:
                assert set(ids) == {run.tokenizer.end_of_text}  # filling
            else:
                expected, seen = expected + found, seen + 1
    assert seen > len(inputs)
    assert together == pytest.approx(expected, rel=1e-5)


def test_epochs_say_how_many_steps_there_are(chosen, tmp_path):
    run = FinetuneRun.make(chosen(tmp_path, steps=0, epochs=3, batch_tokens=320))
    assert run.settings.steps == -(-3 * len(run.feed.rows[0]) // 2)


@pytest.mark.parametrize("lora", [0, 4])
def test_two_processes_train_as_one(base, talk, tmp_path, lora):
    words = ["finetune", "--model", base, "--source", f"talk={talk}", "--steps", 4]
    words += ["--batch-tokens", 640, "--precision", "fp32", "--no-keep-evaluation-out"]
    words += ["--optim.name", "adamw", "--optim.lr", 1e-3, "--optim.warmup", 1]
    words += ["--lora.rank", lora, "--heldout-every", 4, "--loss-on", "all"]
    words = [str(word) for word in words]
    for n, start in ((1, [sys.executable, "-m", "mptbook"]), (2, torchrun(2, "-m", "mptbook"))):
        code, said = run_words([*start, *words, "--out", str(tmp_path / str(n))])
        assert code == 0, said
    one, two = (read_log(tmp_path / str(n), "step") for n in (1, 2))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-4)
    for name, weight in weights(tmp_path / "1" / "model").items():
        torch.testing.assert_close(weights(tmp_path / "2" / "model")[name], weight, msg=name)


BAD = {
    "an empty response": {"prompt": "why", "response": " "},
    "the unknown role 'robot'": {"messages": [{"role": "robot", "content": "so"}]},
    "2 system turns": {"messages": [{"role": "system", "content": "so"}] * 2},
    "ends on a turn of the user": {"messages": [{"role": "user", "content": "so"}]},
    "tokens, and a row holds 161": {"prompt": "why " * 300, "response": "so"},
    "has note, and neither": {"note": "so"},
    "spells <|im_end|>": {"prompt": "why<|im_end|>", "response": "so"},
}


@pytest.fixture
def bad(talk, tmp_path):
    lines = [*talk.read_text().splitlines(), *map(json.dumps, BAD.values()), '{"prompt": '] * 2
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    return {"talk": str(tmp_path / "bad.jsonl")}


def test_bad_rows_are_counted_with_their_lines_and_left_out(bad, chosen, tmp_path):
    finetune(chosen(tmp_path / "run", source=bad, on_bad="skip"))
    (gathered,) = read_log(tmp_path / "run", "gathered")
    assert sum(gathered["conversations"].values()) + sum(gathered["heldout"].values()) == 120
    left_out = {tuple(kind["first"]): kind["rows"] for kind in gathered["left_out"]}
    assert set(left_out.values()) == {2}
    for number, what in enumerate([*BAD, "it is not JSON"], start=61):
        (found,) = [first for first in left_out if what in first[0]]
        assert f"bad.jsonl, line {number}: " in found[0]
        assert f"bad.jsonl, line {number + 68}: " in found[1]


def test_a_bad_row_ends_the_command_with_its_line(bad, chosen, tmp_path, base):
    words = [sys.executable, "-m", "mptbook", "finetune", "--model", str(base)]
    words += ["--source", f"talk={bad['talk']}", "--out", str(tmp_path / "run")]
    code, said = run_words(words)
    assert code == 2
    assert said == (
        f"error: {bad['talk']}, line 61: turn 2 is an empty response; mend it, or leave such rows "
        "out: --on-bad skip\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_long_conversation_loses_its_end_where_that_is_asked(chosen, tmp_path):
    lines = [
        {"prompt": "why", "response": "so far " * 200},  # keeps the begin of its answer
        {"prompt": "why " * 300, "response": "so"},  # keeps nothing to learn
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    long = {"source": {"long": str(tmp_path / "long.jsonl")}, "hold_out": False}
    run = FinetuneRun.make(chosen(tmp_path, **long, too_long="cut", on_bad="skip"))
    ((what, n),) = run.gathered.mistakes.counts.items()
    assert (what, n) == ("nothing of the answer lies in the first N tokens", 1)
    _, targets, documents = next(run.feed.batches(0))
    assert (documents == 1).all()
    assert int(targets[0, -1]) not in (IGNORE, run.tokenizer.end_of_text)
    with pytest.raises(ValueError, match="long has no conversation to learn from: left out 2 rows"):
        FinetuneRun.make(chosen(tmp_path, **long, on_bad="skip"))


def test_a_cut_answer_is_measured_by_the_bytes_that_are_left(chosen, tmp_path):
    row = {"prompt": "why", "response": "so far " * 200}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    source = {"source": {"long": str(tmp_path / "long.jsonl")}, "hold_out": False}
    run = FinetuneRun.make(chosen(tmp_path, **source, too_long="cut"))
    layout = Layout(run.template, run.tokenizer, 160, run.settings)
    conversations = list(read_conversations(str(tmp_path / "long.jsonl"), Mistakes()))
    ((ids, learned),), _, n_bytes = layout.encode(conversations, Mistakes())
    assert len(ids) == 161
    assert n_bytes == len(run.tokenizer.decode(ids[learned.index(True) :]).encode()) < 1400


def test_a_system_turn_is_put_before_conversations_without_one(chosen, tmp_path):
    run = FinetuneRun.make(chosen(tmp_path, system="run far", on_bad="skip"))
    inputs, *_ = next(run.feed.batches(0))
    text = run.tokenizer.decode(inputs[0].tolist())
    assert text.startswith("<|im_start|>system\nrun far<|im_end|>\n<|im_start|>user\n")


def test_what_an_evaluation_asks_is_left_out(chosen, talk, tmp_path):
    from mptbook.data.benchmarks import load_benchmark

    question = load_benchmark("openbookqa")[3].query
    row = {"prompt": f"Tell me.\n{question}", "response": "so"}
    (tmp_path / "asked.jsonl").write_text("\n".join([talk.read_text(), json.dumps(row)]))
    source = {"talk": str(tmp_path / "asked.jsonl")}
    run = FinetuneRun.make(chosen(tmp_path, source=source, keep_evaluation_out=True))
    assert dict(run.gathered.overlaps) == {("openbookqa", "exact"): 1}
