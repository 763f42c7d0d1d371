"""Norms: LayerNorm and RMSNorm, in full and in low precision.

Dimensions in this file
    D   width of the residual stream

Sources: Ba, Kiros and Hinton, arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467; the
names and the low-precision rule are those of llm-foundry's `norm.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension.

    Under autocast PyTorch runs norms in float32 and returns float32. The low-precision kinds
    compute in the autocast dtype instead: input, weight and bias are cast to it, so the
    residual stream is read and written in half the bytes. Without autocast both are the same.

    Args:
        kind: `layernorm`, `rmsnorm`, or either with `low_precision_` before it.
        width: D.
        eps: added to the variance.
        bias: whether a LayerNorm has one; an RMSNorm never has.
    """

    def __init__(self, kind: str, width: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.low_precision = kind.startswith("low_precision_")
        self.rms = kind.endswith("rmsnorm")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, device = self.weight, self.bias, x.device.type
        usable = self.low_precision and torch.amp.is_autocast_available(device)  # not on "meta"
        if not (usable and torch.is_autocast_enabled(device)):
            return self._norm(x, weight, bias)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return self._norm(x.to(dtype), weight.to(dtype), bias)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)
