import pytest
import torch
import torch.nn.functional as F

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.model.norms import Norm

D = 37
KINDS = ["layernorm", "rmsnorm"]
kinds = pytest.mark.parametrize("kind", KINDS)


def norm_and_input(kind, bias=False):
    torch.manual_seed(0)
    norm = Norm(kind, D, eps=1e-3, bias=bias)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm, torch.randn(3, 5, D) * 4 + 1


def by_hand(norm, x):
    x = x.double()
    if not norm.rms:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


@pytest.mark.parametrize("low", ["", "low_precision_"])
@kinds
def test_without_autocast_both_precisions_are_the_formula(kind, low):
    norm, x = norm_and_input(low + kind)
    torch.testing.assert_close(norm(x).double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)


def test_a_layernorm_may_have_a_bias():
    norm, x = norm_and_input("layernorm", bias=True)
    torch.testing.assert_close(norm(x).double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (D,), norm.weight, norm.bias, 1e-3))


def test_an_rmsnorm_has_no_bias_even_if_asked():
    assert Norm("rmsnorm", D, bias=True).bias is None


@kinds
def test_low_precision_returns_the_dtype_of_autocast(kind):
    norm, x = norm_and_input("low_precision_" + kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    # Input, weight and result are each rounded to 8 bits.
    torch.testing.assert_close(y.double(), by_hand(norm, x), rtol=3 * 2**-8, atol=2**-6)


@kinds
def test_full_precision_stays_in_float32_under_autocast(kind):
    norm, x = norm_and_input(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)


@kinds
def test_the_weights_of_a_low_precision_norm_get_float32_gradients(kind):
    norm, x = norm_and_input("low_precision_" + kind)
    with torch.autocast("cpu", torch.bfloat16):
        norm(x).float().square().sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    assert norm.weight.grad.isfinite().all()
    assert (norm.weight.grad != 0).all()


def test_scaling_the_input_leaves_an_rmsnorm_as_it_is():
    norm, x = norm_and_input("rmsnorm")
    norm.eps = 0.0
    torch.testing.assert_close(norm(7 * x), norm(x))


def test_shifting_the_input_leaves_a_layernorm_as_it_is():
    norm, x = norm_and_input("layernorm")
    torch.testing.assert_close(norm(x + 3), norm(x), rtol=1e-4, atol=1e-5)


# Full precision


@kinds
def test_full_precision_is_torchs_norm_bit_for_bit_with_its_gradients(kind):
    norm, x = norm_and_input(kind)
    if kind == "layernorm":
        theirs = torch.nn.LayerNorm(D, eps=1e-3, bias=False)
    else:
        theirs = torch.nn.RMSNorm(D, eps=1e-3)
    theirs.load_state_dict(norm.state_dict())
    results = []
    for module in (norm, theirs):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.backward(x.cos())
        results.append((y, inputs.grad, module.weight.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@kinds
def test_full_precision_is_float32_under_autocast_even_if_the_stream_is_not(kind):
    # As on a GPU; PyTorch's autocast for CPUs would stay in bfloat16.
    norm, x = norm_and_input(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm.bfloat16()(x.bfloat16())
    assert y.dtype == torch.float32
    expected = by_hand(norm, x.bfloat16())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "low_precision_layernorm"])
def test_the_stream_has_the_dtype_of_the_weights_with_either_norm(kind, weights):
    torch.manual_seed(0)
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=29, norm_type=kind)
    model = MPT(config).to(weights)
    stream, normed = [], []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda _, inputs, y: stream.extend((inputs[0], y)))
        block.norm_2.register_forward_hook(lambda _, inputs, y: normed.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(7)[None])
    assert {x.dtype for x in stream} == {weights}
    low = kind.startswith("low")
    assert {y.dtype for y in normed} == {torch.bfloat16 if low else torch.float32}


# Sums over tokens


@pytest.mark.parametrize("autocast", [True, False])
def test_the_gradients_of_weight_and_bias_are_summed_over_tokens_in_float32(autocast):
    width, tokens = 16, 1024 * torch.get_num_threads()
    norm = Norm("low_precision_layernorm", width, bias=True)
    x = torch.tensor([1.0, -1.0]).repeat(tokens, width // 2)
    if not autocast:
        norm, x = norm.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    y.backward(x.to(y.dtype))
    # Every token adds one to the gradient of a weight, and plus or minus one to a bias's.
    torch.testing.assert_close(norm.weight.grad.float(), torch.full((width,), float(tokens)))
    torch.testing.assert_close(norm.bias.grad.float(), x[0].float() * tokens)


def test_pytorchs_own_kernel_for_cpus_stops_at_256():
    # The reason for a detour in `Norm`; when this fails, the detour can go.
    width, threads = 16, torch.get_num_threads()
    x = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(1024 * threads, width // 2)
    weight = torch.ones(width, dtype=torch.bfloat16, requires_grad=True)
    F.layer_norm(x, (width,), weight).backward(x)
    assert (weight.grad <= 256 * threads).all()


def test_the_norm_runs_on_descriptions_of_tensors():
    with torch.device("meta"):
        y = Norm("low_precision_layernorm", D)(torch.empty(3, D))
    assert (y.shape, y.dtype) == ((3, D), torch.float32)
