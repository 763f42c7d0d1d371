import math

import pytest
import torch

from mptbook.bench.peers import GPT2, LLAMA, MPT_PEER, OURS, PEERS, make_model
from mptbook.model.config import MPTConfig

CONFIG = MPTConfig(d_model=48, n_heads=3, n_layers=2, vocab_size=37, max_seq_len=16)


def n_parameters(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", [OURS, *PEERS])
def test_every_contestant_begins_with_the_loss_of_a_guess_and_learns(name):
    torch.manual_seed(0)
    model = make_model(name, CONFIG)
    ids = torch.randint(0, 37, (2, 17))
    x, y = ids[:, :-1], ids[:, 1:]
    first = model.loss(x, y) / y.numel()
    assert first.item() == pytest.approx(math.log(37), rel=0.3)
    torch.testing.assert_close(
        first * y.numel(),
        torch.nn.functional.cross_entropy(
            model(x).float().flatten(0, 1), y.flatten(), reduction="sum"
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        (model.loss(x, y) / y.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.loss(x, y) / y.numel() < 0.7 * first


def test_the_peers_have_the_size_of_mptbooks_model():
    ours = n_parameters(make_model(OURS, CONFIG))
    for name in PEERS:
        extra = 0
        if name == GPT2:  # learned positions, and a bias for every layer and norm
            extra = 16 * 48 + 48 + 2 * (48 + 48 + 3 * 48 + 48 + 4 * 48 + 48)
        elif name == LLAMA:
            assert CONFIG.d_model * 8 % 3 == 0  # so that no rounding of the MLP is to be seen
        assert n_parameters(make_model(name, CONFIG)) == ours + extra


def test_the_peer_is_transformers_mpt_also_where_mptbooks_own_stands_in_auto_classes():
    import mptbook.hf  # noqa: F401  # registers its class for "mpt"

    assert type(make_model(MPT_PEER, CONFIG).model).__module__.startswith("transformers.")


def test_an_unknown_contestant_is_refused():
    with pytest.raises(ValueError, match="'gpt-3' is not a contestant; there are mptbook"):
        make_model("gpt-3", CONFIG)
