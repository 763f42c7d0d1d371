"""`mptbook bench norms`: time and memory of norms in full and in low precision.

A norm is measured as a block has it under autocast: it reads the residual stream, and a linear
layer reads its output in bfloat16, whatever the norm returned. The stream is float32 where the
weights are, as in `mptbook pretrain`, and bfloat16 where a model holds or gathers its weights
in bfloat16, as llm-foundry's runs of MPT did.

Dimensions in this file
    N   rows, one for each token
    D   width of the residual stream
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mptbook.bench.measure import machine, medians, save
from mptbook.model.attention import slopes_of
from mptbook.model.config import NORMS, MPTConfig
from mptbook.model.mpt import Block
from mptbook.model.norms import Norm
from mptbook.settings import RunSettings

STREAMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KERNEL = "PyTorch's kernel"  # LayerNorm in bfloat16, its gradients as PyTorch sums them
COPY = "copy"  # reads the stream and writes bfloat16: the least that any norm must do
KINDS = (*NORMS, KERNEL, COPY)


class Copy(nn.Module):
    """What the next layer would read without any norm: the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() if x.dtype == torch.bfloat16 else x


class Kernel(Norm):
    """A low-precision LayerNorm as llm-foundry computes it, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.bfloat16()
            return F.layer_norm(x.bfloat16(), weight.shape, weight, eps=self.eps)


def norm_and_stream(kind: str, stream: str, rows: int, width: int) -> tuple[nn.Module, Tensor]:
    """One of `KINDS` with random weights, and a normal (N, D) stream; the same each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    if kind == COPY:
        norm = Copy()
    else:
        norm = Kernel("layernorm", width) if kind == KERNEL else Norm(kind, width)
    for weight in norm.parameters():
        nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    return norm.to(STREAMS[stream]), x.to(STREAMS[stream])


def read(norm: nn.Module, x: Tensor) -> Tensor:
    """(N, D) bfloat16: the norm, and the cast that a linear layer makes of its input."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return norm(x).bfloat16()


def forward(norm: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return read(norm, x)


def forward_backward(norm: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the stream and of the norm's weight; that of the output is the stream."""
    inputs = (x.detach().requires_grad_(), *norm.parameters())
    return torch.autograd.grad(read(norm, inputs[0]), inputs, x.bfloat16())


def kept_bytes(norm: nn.Module, x: Tensor) -> int:
    """Bytes that wait for the backward pass: all a norm saves, and the next layer's input.

    A tensor saved twice counts once, and weights do not count. The stream counts where it is
    saved, for nothing else would keep it.
    """
    weights = {weight.data_ptr() for weight in norm.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = read(norm, x.detach().requires_grad_())
    kept[y.data_ptr()] = y
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def block_and_input(kind: str, width: int, tokens: int) -> tuple[Block, Tensor, Tensor]:
    """A block of a model with heads of 64, a (1, T, D) stream in float32, and ALiBi's slopes."""
    torch.manual_seed(0)
    config = MPTConfig(d_model=width, n_heads=width // 64, n_layers=1, norm_type=kind)
    return Block(config, layer=0), torch.randn(1, tokens, width), slopes_of(config)


def block_forward_backward(block: Block, x: Tensor, slopes: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        y = block(x.detach().requires_grad_(), slopes)
    y.backward(x)
    block.zero_grad()


class BenchNorms(RunSettings):
    """Time and memory of norms in full and in low precision: `mptbook bench norms`."""

    widths: list[PositiveInt] = Field(
        [768, 1024, 2048, 4096], description="of the stream; those of 125M, 350M, 1B and 7B"
    )
    rows: PositiveInt = Field(8192, description="tokens; enough that no cache holds them")
    block_tokens: PositiveInt = Field(1024, description="tokens of the row for a whole block")
    repeats: PositiveInt = Field(5, description="rounds; the median is taken")
    out: Path | None = Field(None, description="where to write the figures as JSON")

    def run(self) -> None:
        results = {"machine": machine(), "rows": self.rows, "widths": self.widths}
        print(f"on {results['machine']['cpu']}, {torch.get_num_threads()} threads")
        results["norms"] = {stream: self.measure(stream) for stream in STREAMS}
        results["block"] = self.time_block()
        if self.out is not None:
            save(results, self.out)
            print(f"\nwritten to {self.out}")

    def measure(self, stream: str) -> dict:
        """By kind of norm: seconds, and bytes kept for each number of the stream; by width."""
        print(f"\n{stream} stream: forward ms, forward + backward ms, bytes kept per number")
        found = {kind: {"forward": {}, "forward + backward": {}, "kept": {}} for kind in KINDS}
        for width in self.widths:
            given = {kind: norm_and_stream(kind, stream, self.rows, width) for kind in KINDS}
            for label, run in (("forward", forward), ("forward + backward", forward_backward)):
                calls = {kind: lambda r=run, g=given[kind]: r(*g) for kind in KINDS}
                for kind, seconds in medians(calls, self.repeats).items():
                    found[kind][label][str(width)] = seconds
            print(f"  {width} wide")
            for kind in KINDS:
                kept = kept_bytes(*given[kind]) / (self.rows * width)
                found[kind]["kept"][str(width)] = kept
                ms = [found[kind][label][str(width)] * 1e3 for label in list(found[kind])[:2]]
                print(f"    {kind:24} {ms[0]:8.1f} {ms[1]:8.1f} {kept:8.2f}")
        return found

    def time_block(self) -> dict:
        """Seconds of forward and backward of a whole block of the smallest width, by norm."""
        width = min(self.widths)
        given = {kind: block_and_input(kind, width, self.block_tokens) for kind in NORMS}
        calls = {kind: lambda g=given[kind]: block_forward_backward(*g) for kind in NORMS}
        seconds = medians(calls, self.repeats)
        print(f"\na whole block, {width} wide, {self.block_tokens} tokens, forward + backward: ms")
        for kind, value in seconds.items():
            print(f"    {kind:24} {value * 1e3:8.1f}")
        return {"width": width, "tokens": self.block_tokens, "seconds": seconds}
