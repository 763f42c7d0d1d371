import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptbook.model import horizon, windows
from mptbook.model.alibi import alibi_slopes
from mptbook.model.flash import flash_attention
from mptbook.model.folding import sdpa
from mptbook.model.reference import eager, reference
from mptbook.model.windows import windowed

H, T, K = 3, 300, 8  # q with its folded channels takes 57,600 bytes, T x T bits of bool 90,000
IN_RUNS = torch.tensor([[0] * 120 + [1] * 180])
AGAIN = torch.tensor([[0] * 120 + [1] * 100 + [0] * 80])
NEAR = torch.tensor([3, 40, T])


class Largest(TorchDispatchMode):
    """The bytes of the largest memory behind a tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def largest(form, **how):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, H, T, K))
    with Largest() as seen:
        form(q, k, v, alibi_slopes(H), scale=0.3, **how).sum().backward()
    assert q.grad is not None
    return seen.bytes


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(horizon, "HORIZON_TOKENS", 1)
    monkeypatch.setattr(windows, "BLOCK_QUERIES", 16)


@pytest.mark.parametrize("form", [reference, eager])
def test_what_is_written_down_makes_a_matrix_of_all_queries_and_keys(form):
    assert largest(form) >= 4 * H * T * T


@pytest.mark.parametrize(
    ("form", "how"),
    [
        (sdpa, {}),
        (sdpa, {"documents": IN_RUNS}),
        (windowed, {"windows": NEAR}),
        (windowed, {"windows": NEAR, "documents": IN_RUNS}),
        (windowed, {"windows": NEAR, "documents": AGAIN}),
        (horizon.horizon, {}),
        (horizon.horizon, {"documents": AGAIN}),
        (flash_attention, {"tile": 64}),
    ],
)
def test_memory_is_linear_forward_and_backward(form, how):
    assert largest(form, **how) < T * T


def test_where_a_document_comes_again_all_heads_share_one_mask():
    # The largest are its distances, of 8 bytes; a float32 bias of three heads would take 12.
    assert T * T <= largest(sdpa, documents=AGAIN) <= 8 * T * T
