"""Which number format products are computed in: bfloat16 where the device has units for it."""

from typing import Literal, get_args

import torch

Precision = Literal["auto", "bf16", "fp32"]


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """The context in which a model computes; its weights stay as they are.

    Args:
        precision: `bf16` rounds what enters a product to bfloat16, `fp32` does not; see
            `resolved` for `auto`.

    Raises:
        ValueError: if `precision` is none of them.
    """
    enabled = resolved(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def resolved(device: torch.device, precision: Precision) -> Literal["bf16", "fp32"]:
    """`auto` as `bf16` where the device computes it itself (`has_bf16`), else `fp32`."""
    if precision not in get_args(Precision):
        raise ValueError(
            f"precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}"
        )
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes products of bfloat16 itself.

    Others convert each number, and are slower with them than with float32: measured, 2 times on
    a CPU with AVX-512 but not its bfloat16 part, and many times on one without AVX-512.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = torch.cpu.get_capabilities()
    # The first can be switched off from outside, by ATEN_CPU_CAPABILITY.
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and bool(units.get("avx512_bf16") or units.get("amx_bf16"))
