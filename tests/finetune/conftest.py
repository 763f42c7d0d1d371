import json

import pytest
import torch

from mptbook import MPT, MPTConfig, Tokenizer, save_model

WORDS = "hare ran miles over the hill and far away from here to there".split()


@pytest.fixture(scope="session")
def talk(tmp_path_factory):
    """60 conversations of one exchange or two, as a .jsonl file."""
    file = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    lines = []
    for n in range(60):
        said = [" ".join(WORDS[(n * k + turn) % 13] for k in range(1, 5)) for turn in range(4)]
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        lines.append(json.dumps({"messages": messages[: 2 + n % 2 * 2]}))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def base(data, tmp_path_factory):
    """A model directory of a tiny model, with the tokenizer of `data`."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(5)
    shape = MPTConfig.named("mpt-tiny").replace(
        d_model=24, n_heads=3, n_layers=2, vocab_size=320, max_seq_len=160
    )
    save_model(MPT(shape), folder, Tokenizer.load(data))
    return folder


@pytest.fixture(scope="session")
def chosen(talk, base):
    """`chosen(out, name=value, ...)`: settings of a short finetuning."""
    from mptbook.finetune.sft import Finetune
    from mptbook.train.optimizer import Optim

    def make(out, **changes):
        values = {
            "out": out,
            "model": str(base),
            "source": {"talk": str(talk)},
            "steps": 6,
            "batch_tokens": 640,
            "keep_evaluation_out": False,
            "loss_on": "all",
            "heldout_every": 3,
            "save_every": 2,
            "precision": "fp32",
            "optim": Optim(name="adamw", lr=3e-3, warmup=1),
        }
        return Finetune(**(values | changes))

    return make
