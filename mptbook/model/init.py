"""Initial weights, by the recipes that MPT's configurations name.

Source: llm-foundry's `param_init_fns.py`; He et al., arXiv:1502.01852 (kaiming), Radford et
al. 2019 (residual layers divided by the square root of their number).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mptbook.model.config import InitConfig, MPTConfig
from mptbook.model.norms import Norm


def fill(config: InitConfig, d_model: int) -> Callable[[Tensor], object]:
    """The function that fills a weight matrix (out, in) in place.

    Raises:
        ValueError: if `config.name` is not a recipe.
    """
    mode, nonlinearity, std = config.fan_mode, config.init_nonlinearity, config.init_std
    recipes: dict[str, Callable[[Tensor], object]] = {
        "kaiming_normal_": lambda w: nn.init.kaiming_normal_(w, 0, mode, nonlinearity),
        "kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w, 0, mode, nonlinearity),
        "xavier_normal_": nn.init.xavier_normal_,
        "xavier_uniform_": nn.init.xavier_uniform_,
        "small_init_": lambda w: nn.init.normal_(w, std=math.sqrt(2 / (5 * d_model))),
        "neox_init_": lambda w: nn.init.normal_(w, std=math.sqrt(2 / (5 * d_model))),
        "baseline_": lambda w: nn.init.normal_(w, std=std),
    }
    if config.name not in recipes:
        raise ValueError(f"init name is {config.name!r}; it must be one of {', '.join(recipes)}")
    if config.name == "baseline_" and std is None:
        raise ValueError("baseline_ needs init_std, the standard deviation of every weight")
    return recipes[config.name]


def residual_divisor(config: InitConfig, n_layers: int) -> float:
    """By what the layers that write into the residual stream are divided; False and 0: by 1."""
    if config.init_div_is_residual is not True:
        return float(config.init_div_is_residual or 1)
    if config.name == "neox_init_":
        return n_layers / math.sqrt(10)
    return math.sqrt(2 * n_layers)


@torch.no_grad()
def initialise(model: nn.Module, config: MPTConfig) -> None:
    """Fill every weight of an `MPT`, in the order in which the modules stand.

    The embedding is filled like any matrix unless `emb_init_std` or `emb_init_uniform_lim`
    says otherwise: kaiming gives it, and a head of its own, sqrt(2 / d_model). So the first
    logits have a standard deviation of about 1.4 and the first loss is one nat above the log
    of the vocabulary: 11.8 for MPT-7B.
    """
    init = config.init_config
    fill_ = fill(init, config.d_model)
    divisor = residual_divisor(init, config.n_layers)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if init.emb_init_std is not None:
                nn.init.normal_(module.weight, std=init.emb_init_std)
            elif init.emb_init_uniform_lim is not None:
                limit = init.emb_init_uniform_lim
                nn.init.uniform_(module.weight, -limit, limit)
            else:
                fill_(module.weight)
        elif isinstance(module, nn.Linear):
            # q, k and v share one matrix but are three layers: xavier looks at the fan-out.
            for part in module.weight.split(getattr(module, "parts", len(module.weight))):
                fill_(part)
            if getattr(module, "is_residual", False):
                module.weight.div_(divisor)
        if isinstance(module, Norm):  # also after `to_empty`, which leaves anything in a weight
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, Norm)) and module.bias is not None:
            nn.init.zeros_(module.bias)
