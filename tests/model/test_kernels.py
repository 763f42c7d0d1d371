import importlib.util
import inspect
import sys
import types

import pytest
import torch

from mptbook.model import kernels
from mptbook.model.alibi import alibi_slopes
from mptbook.model.attention import backend, choose
from mptbook.model.config import MPTConfig
from mptbook.model.kernels import can_flash, document_ends, flash
from mptbook.model.mpt import MPT
from mptbook.model.reference import reference

B, H, K = 2, 6, 16
NEAR = torch.tensor([3, 17, 3, 9, 99, 9])


# Signatures and meaning are those of flash_attn_interface.py of flash-attn 2.8.3.
def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """(B, T, heads, K); causal and windows are aligned to the bottom right corner."""
    assert causal
    assert dropout_p == softcap == 0
    assert window_size == (-1, -1) or (window_size[0] >= 0 and window_size[1] == 0)
    assert alibi_slopes.shape == (q.shape[2],)
    assert alibi_slopes.dtype == torch.float32
    left = window_size[0] if window_size != (-1, -1) else k.shape[1]
    windows = torch.full((q.shape[2],), left + 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = reference(q, k, v, alibi_slopes, scale=softmax_scale, windows=windows)
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """(total tokens, heads, K): every sequence by itself."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    for x, ends, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert x.dim() == 3
        assert ends[0] == 0
        assert ends[-1] == len(x)
        assert isinstance(longest, int)
        assert longest == ends.diff().max()
        assert ends.diff().min() > 0
    at_q, at_k = (ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
    how = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    parts = zip(q.split(at_q), k.split(at_k), v.split(at_k), strict=True)
    return torch.cat([flash_attn_func(a[None], b[None], c[None], *how)[0] for a, b, c in parts])


class Calls(list):
    """A fake package whose calls are kept: (name, bound arguments) each."""

    def module(self):
        fake = types.ModuleType("flash_attn")
        for function in (flash_attn_func, flash_attn_varlen_func):
            setattr(fake, function.__name__, self.kept(function))
        return fake

    def kept(self, function):
        def call(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            self.append((function.__name__, bound.arguments))
            return function(*args, **kwargs)

        return call


def install(monkeypatch, found):
    """Let the package look installed in the version `found`, or missing if None."""
    find_spec = importlib.util.find_spec

    def spec(name, package=None):
        return found if name == "flash_attn" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(kernels, "version", lambda name: {"flash-attn": found}[name])


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    monkeypatch.setitem(sys.modules, "flash_attn", calls.module())
    install(monkeypatch, "2.8.3")
    monkeypatch.setattr(kernels, "require_flash", lambda q: None)  # which asks for a GPU
    return calls


def inputs(n_queries, n_keys, kv_heads=H, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(B, H, n_queries, K)
    k, v = torch.randn(2, B, kv_heads, n_keys, K)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def assert_equal_to_the_reference(qkv, **how):
    results = []
    for form in (flash, reference):
        out = form(*qkv, alibi_slopes(H), scale=0.3, **how)
        torch.manual_seed(1)
        results.append([out, *torch.autograd.grad(out, qkv, torch.randn(out.shape))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)  # sums in another order


IN_DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12, [1] * 16 + [0]])
PADDED = torch.tensor([[0] * 5 + [1] * 12, [1] * 17])


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("windows", [None, NEAR], ids=["far", "windows"])
@pytest.mark.parametrize(
    ("n_queries", "documents"),
    [(17, None), (4, None), (1, None), (17, IN_DOCUMENTS), (17, PADDED), (4, PADDED), (1, PADDED)],
)
def test_flash_equals_the_reference(calls, n_queries, documents, windows, kv_heads):
    qkv = inputs(n_queries, 17, kv_heads)
    assert_equal_to_the_reference(qkv, documents=documents, windows=windows)
    assert len(calls) == (1 if windows is None else 4)
    assert {name for name, _ in calls} == {
        "flash_attn_func" if documents is None else "flash_attn_varlen_func"
    }


def test_rows_go_in_whole_with_slopes_scale_and_shared_heads_as_they_are(calls):
    q, k, v = inputs(4, 17, 2, torch.bfloat16)
    out = flash(q, k, v, alibi_slopes(H).double(), scale=0.37)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    [(name, how)] = calls
    assert name == "flash_attn_func"
    assert how["q"].shape == (B, 4, H, K)
    assert how["k"].shape == how["v"].shape == (B, 17, 2, K)
    assert how["k"].data_ptr() == k.data_ptr()  # no copy
    assert how["softmax_scale"] == 0.37
    assert how["causal"] is True
    assert how["window_size"] == (-1, -1)
    assert how["dropout_p"] == 0.0
    assert torch.equal(how["alibi_slopes"], alibi_slopes(H))


def test_dropout_is_handed_on(calls):
    with pytest.raises(AssertionError):
        flash(*inputs(4, 17), alibi_slopes(H), scale=0.3, dropout=0.25)
    assert calls[0][1]["dropout_p"] == 0.25


def test_documents_are_laid_end_to_end_over_all_rows(calls):
    flash(*inputs(17, 17), alibi_slopes(H), scale=0.3, documents=IN_DOCUMENTS)
    [(_, how)] = calls
    assert how["q"].shape == how["k"].shape == (B * 17, H, K)
    assert how["cu_seqlens_q"].tolist() == how["cu_seqlens_k"].tolist() == [0, 5, 17, 33, 34]
    assert how["max_seqlen_q"] == how["max_seqlen_k"] == 16


def test_cached_keys_of_padding_are_left_out(calls):
    flash(*inputs(4, 17, 2), alibi_slopes(H), scale=0.3, documents=PADDED)
    [(_, how)] = calls
    assert how["q"].shape == (B * 4, H, K)
    assert how["k"].shape == (12 + 17, 2, K)
    assert how["cu_seqlens_q"].tolist() == [0, 4, 8]
    assert how["cu_seqlens_k"].tolist() == [0, 12, 29]
    assert (how["max_seqlen_q"], how["max_seqlen_k"]) == (4, 17)


def test_heads_of_one_window_go_together(calls):
    flash(*inputs(17, 17), alibi_slopes(H), scale=0.3, windows=NEAR)
    found = [(how["window_size"], how["alibi_slopes"].tolist()) for _, how in calls]
    slopes = alibi_slopes(H)
    heads = [((2, 0), [0, 2]), ((8, 0), [3, 5]), ((16, 0), [1]), ((16, 0), [4])]
    assert found == [(window, slopes[at].tolist()) for window, at in heads]  # 99 is all there is


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("row", [[0, 1, 0], [5, 5, 5]])
def test_a_document_that_comes_again_is_refused(row):
    documents = torch.tensor([row, [0, 1, 0]])
    with pytest.raises(ValueError, match=r"comes again after another in its row, .* choose sdpa"):
        flash(*inputs(3, 3), alibi_slopes(H), scale=0.3, documents=documents)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    "row", [[0] * 14 + [1] * 3, [1] + [0] + [1] * 15], ids=["begins among the queries", "again"]
)
def test_new_queries_of_several_documents_are_refused(row):
    documents = torch.tensor([[0] * 17, row])
    with pytest.raises(ValueError, match="4 queries after cached keys belong to several documents"):
        flash(*inputs(4, 17), alibi_slopes(H), scale=0.3, documents=documents)


def test_equal_ids_at_the_border_of_two_rows_are_two_documents():
    ends, longest = document_ends(torch.tensor([[0, 0, 7], [7, 7, 7]]))
    assert ends.tolist() == [0, 2, 3, 6]
    assert ends.dtype == torch.int32
    assert longest == 3


@pytest.mark.parametrize(
    ("found", "q", "text"),
    [
        (None, torch.empty(1, 1, 1, K), "flash needs the package flash-attn: pip install .*sdpa"),
        (
            "2.4.1",
            torch.empty(1, 1, 1, K),
            r"flash-attn 2.4.1 has no ALiBi; .* 2.4.2 or newer",
        ),
        ("2.8.3", torch.empty(1, 1, 1, K), "on a GPU and the tensors are on cpu; choose sdpa"),
    ],
)
def test_what_flash_lacks_is_said_with_a_way_out(monkeypatch, found, q, text):
    install(monkeypatch, found)
    with pytest.raises(ValueError, match=text):
        flash(q, q, q, torch.ones(1), scale=0.3)
    assert not can_flash(q)


class OnGPU:
    """As much of queries on a GPU as is looked at."""

    device = torch.device("cuda")

    def __init__(self, dtype, width):
        self.dtype, self.shape = dtype, (1, 1, 1, width)


@pytest.mark.parametrize(
    ("dtype", "width", "text"),
    [
        (torch.float32, 64, "no kernel for torch.float32; use bfloat16 .*, or choose sdpa"),
        (torch.bfloat16, 264, "264 wide, and flash takes multiples of 8 up to 256; choose sdpa"),
        (torch.bfloat16, 260, "260 wide, and flash takes multiples of 8 up to 256; choose sdpa"),
        (torch.float16, 12, "12 wide, and flash takes multiples of 8 up to 256; choose sdpa"),
    ],
)
def test_a_dtype_or_width_without_a_kernel_is_refused(monkeypatch, dtype, width, text):
    install(monkeypatch, "2.8.3")
    with pytest.raises(ValueError, match=text):
        kernels.require_flash(OnGPU(dtype, width))
    assert choose(OnGPU(dtype, width), OnGPU(dtype, width)) == "sdpa"


@pytest.mark.parametrize("found", [kernels.FLASH_ATTN, "2.8.3", "2.8.3.post2"])
def test_a_gpu_takes_flash_where_it_is_installed(monkeypatch, found):
    q = OnGPU(torch.bfloat16, 256)
    install(monkeypatch, found)
    assert choose(q, q) == "flash"
    install(monkeypatch, None)
    assert choose(q, q) == "sdpa"


def test_a_model_that_asks_for_flash_says_what_to_install(monkeypatch):
    install(monkeypatch, None)
    config = MPTConfig(d_model=H * K, n_heads=H, n_layers=1, vocab_size=97)
    with pytest.raises(ValueError, match=r"pip install --no-build-isolation 'flash-attn>=2.4.2'"):
        MPT(config.replace(attn_impl="flash"))
    install(monkeypatch, "2.8.3")
    assert backend("flash") is flash


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func])
def test_the_fake_has_the_signature_of_the_package(function):
    package = pytest.importorskip("flash_attn")
    assert inspect.signature(getattr(package, function.__name__)) == inspect.signature(function)
