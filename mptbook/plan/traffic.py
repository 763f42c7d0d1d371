"""What GPUs send each other in a training step under fully sharded data parallelism.

Dimensions in this file
    n   GPUs that share one copy of the weights
    R   copies of the weights

Sources: Rajbhandari et al., arXiv:1910.02054, section 7; PyTorch's `fully_shard`.
"""

from mptbook.model.config import MPTConfig
from mptbook.plan.costs import parameters
from mptbook.plan.memory import Setup, block_and_root


def traffic(config: MPTConfig, setup: Setup) -> dict[str, int]:
    """Bytes that each GPU sends for one micro-batch, by kind, and their `total`.

    It receives as many, in a ring: each passes on to one neighbour what it got from the other. So
    a machine of eight GPUs sends to the next machine as much as one GPU does, and not eight times.

    A GPU has one part in n of the weights and gets the rest, (n - 1) / n,
    from the others: of all weights before they are used forwards, and of the blocks' again on the
    way back, since they were dropped in between; the root stays. Gradients go the same way
    once, added up on arrival. With R copies, what one GPU owns is averaged over the copies:
    twice (R - 1) / R of it.

    Recomputing a block costs no traffic: its weights are there for its backward pass.
    """
    n, copies = setup.n_shards, setup.gpus // setup.n_shards
    total, policy = parameters(config)["total"], setup.policy
    _, root = block_and_root(config)
    moved = (n - 1) / n
    parts = {
        "gather forwards": round(moved * policy.gathered * total),
        "gather backwards": round(moved * policy.gathered * (total - root)),
        "reduce-scatter": round(moved * policy.reduced * total),
        "all-reduce": round(2 * (copies - 1) / copies * policy.reduced * total / n),
    }
    return parts | {"total": sum(parts.values())}
