"""What a plan says that a training step keeps, against what PyTorch really keeps here."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.profiler import ProfilerActivity, profile

from mptbook.model.config import MPTConfig
from mptbook.model.folding import FOLDED_CHANNELS
from mptbook.model.mpt import MPT
from mptbook.plan.activations import (
    backward_bytes,
    kept_by_block,
    kept_bytes,
    kept_outside,
    recomputed_blocks,
)
from mptbook.plan.costs import parameters

SMALL = MPTConfig(d_model=48, n_heads=6, n_layers=5, vocab_size=131, max_seq_len=17)
CASES = {
    "as released": {},
    "one key head": {"attn_type": "multiquery_attention"},
    "clipped": {"clip_qkv": 6.0},
    "full norms": {"norm_type": "layernorm"},
    "narrow MLP": {"expansion_ratio": 1.5},
    "wide heads, biases": {"n_heads": 2, "no_bias": False},
}


def built(config, recompute=False):
    torch.manual_seed(0)
    model = MPT(config.replace(attn_impl="sdpa"))
    model.recompute = recompute
    return model


def kept_by_autograd(config, rows, tokens, recompute=False, bf16=False):
    """Bytes of the distinct storages that the graph of the loss holds, weights left out."""
    model = built(config, recompute)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(config.vocab_size, (rows, tokens))
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = model.loss(ids, ids)
    assert loss.requires_grad
    return sum(found.values())


def more_on_cpu(config, product_bytes=4):
    """Bytes a token that a block keeps here and not with the kernel that plans assume.

    ALiBi is folded into copies of q, k and v, every key head repeated, and the output has the
    folded channels too, of which `out_proj` reads a copy without them.
    """
    folded = product_bytes * config.n_heads * (config.head_width + FOLDED_CHANNELS)
    return 4 * folded - kept_by_block(config, product_bytes)["queries, keys, values"]


def planned(config, tokens, every=0, product_bytes=4):
    """The plan's bytes of the graph of the loss, with what differs here."""
    outside = kept_outside(config, product_bytes)
    of_graph = outside["last norm input"] + outside["its gradient"] + 8  # ids; no targets
    blocks = config.n_layers - recomputed_blocks(config, every)
    head_gradient = 4 * config.vocab_size * config.d_model  # which a plan counts with the logits
    how = {"product_bytes": product_bytes, "stream_bytes": 4}
    differs = tokens * (blocks * more_on_cpu(config, product_bytes) + of_graph)
    return kept_bytes(config, tokens, every, **how) + differs + head_gradient


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rows", "tokens"), [(3, 17), (1, 13)])
def test_what_blocks_keep_is_what_autograd_keeps_to_the_byte(case, rows, tokens):
    config = SMALL.replace(**CASES[case])
    assert kept_by_autograd(config, rows, tokens) == planned(config, rows * tokens)


@pytest.mark.parametrize(("rows", "tokens"), [(3, 17), (1, 13), (2, 5)])
def test_a_recomputed_block_keeps_its_input_only(rows, tokens):
    found = kept_by_autograd(SMALL, rows, tokens, recompute=True)
    # The slopes, and an empty tensor that `checkpoint` makes.
    assert 0 <= found - planned(SMALL, rows * tokens, every=1) <= 4 * SMALL.n_heads + 8


def test_autocast_keeps_a_copy_of_every_matrix():
    found = kept_by_autograd(SMALL, 3, 17, bf16=True)
    parts, norms = parameters(SMALL), 2 * SMALL.n_layers + 1
    copies = 2 * (parts["attention"] + parts["mlp"])
    # A norm on a CPU reads float32 copies of its input and weight: 2 and 4 bytes more a number.
    of_norms = norms * (2 * 3 * 17 + 4) * SMALL.d_model
    assert found == planned(SMALL, 3 * 17, product_bytes=2) + copies + of_norms


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_copies_of_autocast_outlive_the_weights_that_fsdp_gathers(one_process, recompute):
    config = SMALL.replace(d_model=96)
    model = built(config, recompute)
    for block in model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    ids = torch.zeros(1, 3, dtype=torch.long)
    allocated = []
    for bf16 in (False, True):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            computing = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
            computing.__enter__()
            loss = model.loss(ids, ids)
        computing.__exit__(None, None, None)
        events = profiler.profiler.kineto_results.events()
        allocated.append(sum(e.nbytes() for e in events if e.name() == "[memory]"))
        loss.backward()  # ends the step for FSDP
        del loss
    parts = parameters(config)
    copies = 2 * (parts["attention"] + parts["mlp"])
    assert allocated[1] - allocated[0] == pytest.approx(copies, rel=0.1)


def peak_of_a_step(config, rows, tokens, recompute):
    """The most bytes that are allocated at once in a forward and backward pass."""
    model = built(config, recompute)
    ids = torch.randint(config.vocab_size, (rows, tokens))
    model.loss(ids, ids).backward()  # gradients are there from now on, as after a micro-batch
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.loss(ids, ids).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize(("rows", "tokens"), [(3, 167), (8, 128)])
@pytest.mark.parametrize("case", ["as released", "narrow MLP", "clipped"])
def test_the_peak_of_a_step_is_the_planned_one_within_a_few_percent(case, rows, tokens, every):
    config = SMALL.replace(d_model=96, n_layers=4, **CASES[case])
    n, how = rows * tokens, {"product_bytes": 4, "stream_bytes": 4}
    expected = kept_bytes(config, n, every, **how) + backward_bytes(config, n, every, **how)
    blocks_here = 1 if every else config.n_layers
    expected += n * blocks_here * more_on_cpu(config)
    expected += 4 * config.d_model * config.mlp_width  # the gradient of a matrix, before its sum
    found = peak_of_a_step(config, rows, tokens, bool(every))
    print(case, rows, tokens, every, found, expected, expected / found)
    assert expected == pytest.approx(found, rel=0.05)


def test_every_second_block_keeps_half():
    config = SMALL.replace(n_layers=4)
    none, all_of_them, half = (kept_bytes(config, 7, every) for every in (0, 1, 2))
    assert half == (none + all_of_them) / 2
    assert recomputed_blocks(SMALL, 2) == 3  # of five: the first, third and fifth
