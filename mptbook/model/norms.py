"""Norms: LayerNorm and RMSNorm, in full and in low precision.

Dimensions in this file
    D   width of the residual stream

Sources: Ba, Kiros and Hinton, arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467; the
names and the low-precision rule are those of llm-foundry's `norm.py`.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension.

    Under autocast the full kinds compute and return float32; the low-precision kinds first cast
    input, weight and bias to its dtype and return that. Otherwise the input's dtype is kept.

    Args:
        kind: `layernorm`, `rmsnorm`, or either with `low_precision_` before it.
        width: D.
        eps: added to the variance.
        bias: whether a LayerNorm has one; an RMSNorm never has.
    """

    def __init__(self, kind: str, width: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.low_precision, self.rms = kind.startswith("low_"), kind.endswith("rmsnorm")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        device, dtype, outside = x.device.type, x.dtype, nullcontext()
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device) if self.low_precision else torch.float32
            outside = torch.autocast(device, enabled=False)
        with outside:
            given = [t if t is None else t.to(dtype) for t in (x, self.weight, self.bias)]
            if device == "cpu" and dtype.itemsize == 2:
                # Its kernel would sum the gradients of the weight, one a token, in 16 bits.
                given = [t if t is None else t.float() for t in given]
            x, weight, bias = given
            norm = F.rms_norm if self.rms else partial(F.layer_norm, bias=bias)
            return norm(x, weight.shape, weight, eps=self.eps).to(dtype)
