"""Memory of one GPU in training, part by part, under fully sharded data parallelism.

Dimensions in this file
    N   parameters;  V  vocabulary;  D  width of the residual stream
    n   GPUs that share one copy of the weights

Sources: PyTorch's `fully_shard` for what is gathered, and when; `mptbook.model.loss` for the
logits; `mptbook.plan.activations` for the rest.
"""

from dataclasses import dataclass, replace

from mptbook.model.config import MPTConfig
from mptbook.model.loss import ROWS
from mptbook.plan.activations import (
    backward_bytes,
    kept_bytes,
    kept_outside,
    recomputed_blocks,
)
from mptbook.plan.costs import GIB, GPU, STATE_BYTES, parameters


@dataclass(frozen=True)
class Policy:
    """Bytes of a number, by what becomes of it. The shard that a GPU owns is float32 in all."""

    gathered: int  # weights on their way to and in a block, and their gradients
    reduced: int  # gradients on their way to the GPU that owns them
    stream: int  # residual stream


POLICIES = {"full": Policy(4, 4, 4), "default": Policy(2, 4, 2), "pure": Policy(2, 2, 2)}


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory, traffic and time depend on it.

    Attributes:
        gpus: how many.
        row_tokens: tokens of a row.
        optimizer: one of `STATE_BYTES`.
        precision: one of `POLICIES`. `full`: float32 weights, products under autocast;
            `default`: weights and activations in bfloat16, gradients added up in float32;
            `pure`: gradients in bfloat16 too.
        recompute: 1 computes each block again, k every k-th; 0 none.
        shards: GPUs that share one copy of the weights, a divisor of `gpus`; None: all of them.

    Raises:
        ValueError: naming the value, the rule and a way out.
    """

    gpus: int
    row_tokens: int
    optimizer: str = "lion"
    precision: str = "pure"
    recompute: int = 1
    shards: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("optimizer", STATE_BYTES), ("precision", POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        if self.gpus % self.n_shards:
            raise ValueError(
                f"shards={self.n_shards} does not divide gpus={self.gpus}; copies of the weights "
                "must be equally large, so take a divisor, or leave it out"
            )

    @property
    def n_shards(self) -> int:
        return self.shards or self.gpus

    @property
    def policy(self) -> Policy:
        return POLICIES[self.precision]

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered at all: one GPU that computes in `full` has them."""
        return self.n_shards > 1 or self.precision != "full"


def memory(config: MPTConfig, setup: Setup, micro_rows: int) -> dict[str, int]:
    """Bytes on one GPU at the fullest moment of a training step, by part, and their `total`.

    CUDA's context and gaps between tensors are not in it; see `reserve`.

    Args:
        micro_rows: rows that the GPU takes through the model at once.
    """
    return max(moments(config, setup, micro_rows).values(), key=lambda parts: parts["total"])


def moments(config: MPTConfig, setup: Setup, micro_rows: int) -> dict[str, dict[str, int]]:
    """Parts as in `memory` at the two moments that can be the fullest.

    `loss`: the forward pass is over and everything it keeps is there. `backward`: the loss is
    over too, and one block is computed again where that was asked for, and goes backwards.
    """
    policy, tokens = setup.policy, micro_rows * setup.row_tokens
    owned = -(-parameters(config)["total"] // setup.n_shards)
    owns = {
        "weights": 4 * owned,
        "gradients": 4 * owned,
        "optimizer": STATE_BYTES[setup.optimizer] * owned,
    }
    how = {"every": setup.recompute, "stream_bytes": policy.stream}
    kept = kept_bytes(config, tokens, **how)
    found = {
        "loss": {
            "activations": kept + tokens * sum(kept_outside(config).values()),
            "logits": logit_bytes(config, tokens, policy),
            "buffers": buffers_at_loss(config, setup),
        },
        "backward": {
            "activations": kept + backward_bytes(config, tokens, **how),
            "logits": 0,
            "buffers": buffers_backwards(config, setup),
        },
    }
    return {
        moment: owns | parts | {"total": sum((owns | parts).values())}
        for moment, parts in found.items()
    }


def buffers_at_loss(config: MPTConfig, setup: Setup) -> int:
    """Whole weights that are on a GPU when the loss is computed.

    Those of the root, which is the embedding and the last norm. In `full`, autocast made a
    bfloat16 copy of each matrix, and a copy is not resharded: autograd and autocast's own cache
    hold on to it.
    """
    parts, policy = parameters(config), setup.policy
    _, root = block_and_root(config)
    copies = 2 * (parts["attention"] + parts["mlp"]) if setup.precision == "full" else 0
    return copies + (policy.gathered * root if setup.sharded else 0)


def buffers_backwards(config: MPTConfig, setup: Setup) -> int:
    """Whole weights and whole gradients on a GPU while a block goes backwards.

    The weights of that block, of the next one, which is gathered meanwhile, and of the root; the
    gradients of the block and the root, and those of a block once more, where they are
    laid out for the GPUs that own them. In `full` the copies of recomputed blocks are gone.
    """
    parts, policy = parameters(config), setup.policy
    block, root = block_and_root(config)
    whole = 0
    if setup.sharded:
        whole = policy.gathered * (3 * block + 2 * root) + policy.reduced * block
    if setup.precision == "full":
        again = recomputed_blocks(config, setup.recompute)
        blocks_with_copies = config.n_layers - again + (again > 0)
        whole += 2 * (parts["attention"] + parts["mlp"]) * blocks_with_copies // config.n_layers
    return whole


def block_and_root(config: MPTConfig) -> tuple[int, int]:
    """Parameters of one block, and of all that is in no block."""
    total = parameters(config)["total"]
    block = parameters(config.replace(n_layers=config.n_layers + 1))["total"] - total
    return block, total - config.n_layers * block


def logit_bytes(config: MPTConfig, tokens: int, policy: Policy) -> int:
    """What `mptbook.model.loss` needs, which makes those of `ROWS` tokens at a time.

    Logits in bfloat16 and float32, with those of the pieces before still in memory: 14 bytes for
    each token of a piece and word. The gradient of the head is summed in float32, 4 bytes for each
    weight, with a product of 2 to be added; in the backward pass it is multiplied by the
    gradient of the loss, which takes it a second time. Under `full` the head has a copy.
    """
    piece = min(tokens, ROWS) * config.vocab_size
    head = config.vocab_size * config.d_model
    copy = 2 * head if policy.gathered == 4 else 0
    return max(14 * piece + (4 + 2) * head + copy, (4 + 4 + 2) * head)


def reserve(gpu: GPU) -> int:
    """Bytes that a plan leaves alone: an assumption, 1 GiB and 5 % of the memory.

    The first is for CUDA's context and the libraries' work space, the second for gaps that the
    allocator cannot fill, and for what a card has less than its name says.
    """
    return GIB + gpu.memory_bytes // 20


def shortage(config: MPTConfig, setup: Setup, gpu: GPU, micro_rows: int = 1) -> int:
    """Bytes by which a micro-batch exceeds what the GPU has; negative if it fits."""
    return memory(config, setup, micro_rows)["total"] + reserve(gpu) - gpu.memory_bytes


def largest_micro_batch(config: MPTConfig, setup: Setup, gpu: GPU) -> int:
    """The most rows that fit on the GPU at once; 0 if not even one does."""
    if shortage(config, setup, gpu) > 0:
        return 0
    fits, too_many = 1, 2
    while shortage(config, setup, gpu, too_many) <= 0:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if shortage(config, setup, gpu, middle) <= 0:
            fits = middle
        else:
            too_many = middle
    return fits


def longest_row(config: MPTConfig, setup: Setup, gpu: GPU) -> int:
    """The most tokens of which one row fits on the GPU, whatever `setup` says; 0 for none."""

    def fits(row_tokens: int) -> bool:
        return shortage(config, replace(setup, row_tokens=row_tokens), gpu) <= 0

    if not fits(1):
        return 0
    low, too_many = 1, 2
    while fits(too_many):
        low, too_many = too_many, 2 * too_many
    while too_many - low > 1:
        middle = (low + too_many) // 2
        low, too_many = (middle, too_many) if fits(middle) else (low, middle)
    return low
