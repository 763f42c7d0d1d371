"""`mptbook bench attention`: time, memory and error of attention beside its peers.

Dimensions in this file
    B   batch
    H   heads
    T   tokens
    K   width of a head
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from mptbook.bench.measure import machine, medians, peak_memory, save
from mptbook.model.alibi import alibi_bias, alibi_slopes
from mptbook.model.attention import auto
from mptbook.model.folding import sdpa
from mptbook.model.reference import reference
from mptbook.settings import RunSettings

H, K = 8, 64
SCALE = K**-0.5
TRANSFORMERS = "transformers' MPT"


def random_qkv(batch: int, tokens: int, dtype=torch.bfloat16) -> Tensor:
    """(3, B, H, T, K) normal queries, keys and values, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, H, tokens, K, generator=generator).to(dtype)


def mptbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `Attention` computes, as it chooses by itself."""
    return auto(q, k, v, alibi_slopes(H), scale=SCALE)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ALiBi folded into q and k: every key, by PyTorch's kernel."""
    return sdpa(q, k, v, alibi_slopes(H), scale=SCALE)


def with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's kernel with ALiBi as a tensor of (H, T, T), made beforehand."""
    return F.scaled_dot_product_attention(q, k, v, bias_tensor(q.shape[2], q.dtype))


def without_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's kernel, causal, with no positions."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def transformers_mpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`MptAttention` of transformers, as its model calls it, without the linear layers."""
    layer, bias, mask = transformers_layer(q.shape[2])
    mixed = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=2)
    out = layer(mixed, bias, attention_mask=mask)[0]
    return out.unflatten(2, (H, K)).transpose(1, 2)


_made: dict = {}  # what a user's program makes once and not in every call


def bias_tensor(tokens: int, dtype: torch.dtype) -> Tensor:
    """(1, H, T, T): the ALiBi bias with the causal mask."""
    key = "bias", tokens, dtype
    if key not in _made:
        _made[key] = alibi_bias(alibi_slopes(H), tokens, tokens).to(dtype)
    return _made[key]


def transformers_layer(tokens: int):
    """The layer, its (H, 1, T) bias and its (1, 1, T, T) mask."""
    key = "layer", tokens
    if key not in _made:
        from transformers import MptConfig
        from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

        layer = MptAttention(MptConfig(d_model=H * K, n_heads=H)).eval()
        layer.Wqkv = layer.out_proj = torch.nn.Identity()
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)
        _made[key] = layer, build_mpt_alibi_tensor(H, tokens), mask
    return _made[key]


FORMS = {
    "mptbook": mptbook,
    "ALiBi folded, SDPA": folded,
    "SDPA with a bias tensor": with_bias,
    "SDPA without ALiBi": without_alibi,
    TRANSFORMERS: transformers_mpt,
}


def forward(form, qkv: Tensor) -> Tensor:
    with torch.no_grad():
        return form(*qkv)


def forward_backward(form, qkv: Tensor) -> None:
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    form(q, k, v).backward(qkv[0])


def one_pass(name: str, backward: bool, tokens: int) -> None:
    """One call on one row, for `peak_memory`."""
    (forward_backward if backward else forward)(FORMS[name], random_qkv(1, tokens))


def errors(tokens: int = 2048) -> dict[str, float]:
    """For each form in bfloat16, the root mean square of its error over that of the output.

    Against `reference` in float32 on the same bfloat16 numbers; the form without ALiBi against
    the same with slopes of zero.
    """
    qkv = random_qkv(2, tokens)
    found = {}
    for name, form in FORMS.items():
        slopes = torch.zeros(H) if form is without_alibi else alibi_slopes(H)
        exact = reference(*qkv.float(), slopes, scale=SCALE)
        found[name] = float((forward(form, qkv).float() - exact).norm() / exact.norm())
    return found


class BenchAttention(RunSettings):
    """Time, memory and error of attention beside its peers: `mptbook bench attention`."""

    tokens: PositiveInt = Field(4096, description="tokens of the rows timed")
    long_tokens: PositiveInt = Field(65_536, description="tokens of the long row")
    repeats: PositiveInt = Field(5, description="rounds; the median is taken")
    out: Path | None = Field(None, description="where to write the figures as JSON")

    def run(self) -> None:
        results = {"machine": machine()}
        print(f"on {results['machine']['cpu']}, {torch.get_num_threads()} threads, bfloat16")
        results["seconds"] = self.time_all()
        results["long"] = self.time_long()
        results["memory"] = self.measure_memory()
        results["error"] = errors()
        print("\nerror against float32, 2,048 tokens")
        for name, error in results["error"].items():
            print(f"  {name:26} {error:.2e}")
        if self.out is not None:
            save(results, self.out)
            print(f"\nwritten to {self.out}")

    def time_all(self) -> dict:
        """Forward, and forward with backward, of every form."""
        qkv = random_qkv(2, self.tokens)
        print(f"\n{self.tokens:,} tokens, B 2, H {H}, K {K}: ms, and how many times mptbook's")
        seconds = {}
        for label, run in (("forward", forward), ("forward + backward", forward_backward)):
            calls = {name: lambda f=form, r=run: r(f, qkv) for name, form in FORMS.items()}
            seconds[label] = medians(calls, self.repeats)
            print(f"  {label}")
            for name, value in seconds[label].items():
                print(f"    {name:26} {value * 1e3:9.1f}  {value / seconds[label]['mptbook']:6.2f}")
        return {"tokens": self.tokens, "batch": 2} | seconds

    def time_long(self) -> dict:
        """The horizon against all keys, forward, on one long row; and how far they differ."""
        qkv = random_qkv(1, self.long_tokens)
        names = ("mptbook", "ALiBi folded, SDPA")
        calls = {name: lambda f=FORMS[name]: forward(f, qkv) for name in names}
        seconds = medians(calls, self.repeats)
        near, dense = (forward(FORMS[name], qkv).float() for name in names)
        difference = {
            "largest": float((near - dense).abs().max()),
            "relative": float((near - dense).norm() / dense.norm()),
        }
        print(f"\n{self.long_tokens:,} tokens, B 1, forward")
        for name, value in seconds.items():
            print(f"    {name:26} {value:8.2f} s  {value / seconds['mptbook']:6.2f}")
        print(
            "    largest and relative difference: {largest:.1e} {relative:.1e}".format(**difference)
        )
        return {"tokens": self.long_tokens, "seconds": seconds, "difference": difference}

    def measure_memory(self) -> dict:
        """Peak memory of forward + backward; transformers at an eighth of the lengths."""
        print("\npeak memory of forward + backward, B 1, inputs included")
        found: dict[str, dict[str, int | None]] = {}
        for name, share in (("mptbook", 1), (TRANSFORMERS, 8)):
            found[name] = {}
            for tokens in (self.long_tokens // 4 // share, self.long_tokens // share):
                found[name][str(tokens)] = peak_memory(one_pass, name, True, tokens)
            small, large = found[name].values()
            lengths = " to ".join(f"{int(tokens):,}" for tokens in found[name])
            print(
                f"    {name:20} {lengths} tokens: {small / 1e9:.2f} to {large / 1e9:.2f} GB, "
                f"{large / small:.1f} times"
            )
        return found
