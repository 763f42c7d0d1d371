"""What a model costs before it exists: parameters, FLOPs, memory, traffic, days, dollars."""

from mptbook.plan.costs import (
    GIB,
    GPU,
    GPUS,
    SECONDS_PER_DAY,
    STATE_BYTES,
    cache_bytes_per_token,
    days,
    flops_per_token,
    gpu_named,
    mfu,
    parameters,
    training_bytes_per_parameter,
    weight_bytes,
)

__all__ = [
    "GIB",
    "GPU",
    "GPUS",
    "SECONDS_PER_DAY",
    "STATE_BYTES",
    "cache_bytes_per_token",
    "days",
    "flops_per_token",
    "gpu_named",
    "mfu",
    "parameters",
    "training_bytes_per_parameter",
    "weight_bytes",
]
