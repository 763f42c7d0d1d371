"""What the forward pass leaves behind for the backward pass, tensor by tensor.

Dimensions in this file
    D   width of the residual stream;  F  of the MLP
    G   width of all key heads together
    H   query heads

Read off `mptbook.model`, for a kernel of attention that stores its output and one number for
each query and head, as `mptbook.model.kernels.flash` does. So nothing grows with the square of
the row.
"""

from mptbook.model.config import MPTConfig

FLOAT = 4  # bytes; statistics of norms and of softmaxes are kept in float32 whatever the rest is


def kept_by_block(config: MPTConfig, product_bytes: int = 2) -> dict[str, int]:
    """Bytes that one block keeps for each token, by tensor.

    A tensor that two operations need is counted once, views of it not at all. Weights are not
    counted, nor the copies of them that autocast makes.

    Args:
        product_bytes: of a number that enters a product: 2 in bfloat16, 4 in float32.
    """
    d_model, d_keys = config.d_model, config.kv_heads * config.head_width
    wide, attn = product_bytes * config.mlp_width, config.attn_config
    low = config.norm_type.startswith("low_precision")
    of_norm = product_bytes if low else FLOAT
    statistics = FLOAT if config.norm_type.endswith("rmsnorm") else 2 * FLOAT
    kept = {
        "norm_1 input": of_norm * d_model + statistics,
        "Wqkv input": product_bytes * d_model,
        "queries, keys, values": product_bytes * (d_model + 2 * d_keys),
        "attention output": product_bytes * d_model,
        "softmax sums": FLOAT * config.n_heads,
        "norm_2 input": of_norm * d_model + statistics,
        "up_proj input": product_bytes * d_model,
        "GELU input": wide,
        "down_proj input": wide,
    }
    if attn.clip_qkv is not None:
        kept["before the clip"] = product_bytes * (d_model + 2 * d_keys)
    if attn.qk_ln:
        copies = 0 if low else FLOAT * (d_model + d_keys)  # a low-precision norm reads a view
        kept["norms of queries and keys"] = (
            product_bytes * (d_model + d_keys) + copies + 2 * statistics
        )
    if config.resid_pdrop:
        kept["dropout masks"] = 2 * d_model
    return kept


def kept_outside(config: MPTConfig, product_bytes: int = 2) -> dict[str, int]:
    """Bytes for each token behind the last block; they are gone when the blocks go backwards.

    The loss computes the gradient of the last norm's output while that is still there.
    """
    of_norm = product_bytes if config.norm_type.startswith("low_precision") else FLOAT
    return {
        "ids and targets": 16,
        "last norm input": of_norm * config.d_model + 2 * FLOAT,
        "last norm output": of_norm * config.d_model,
        "its gradient": of_norm * config.d_model,
    }


def recomputed_blocks(config: MPTConfig, every: int) -> int:
    """How many blocks keep only their input: every k-th from the first; 0 for none."""
    return -(-config.n_layers // every) if every else 0


def kept_bytes(
    config: MPTConfig, tokens: int, every: int, product_bytes: int = 2, stream_bytes: int = 2
) -> int:
    """Bytes that all blocks keep when the forward pass is over.

    Args:
        tokens: of the micro-batch: its rows times their length.
        every: 1 recomputes each block, 2 every second one; 0 recomputes nothing. A recomputed
            block keeps its input and nothing else.
        stream_bytes: of a number of the residual stream: 4 under autocast with float32 weights,
            because the embedding is no product; 2 where the weights themselves are bfloat16.
    """
    again = recomputed_blocks(config, every)
    block = sum(kept_by_block(config, product_bytes).values())
    return tokens * ((config.n_layers - again) * block + again * stream_bytes * config.d_model)


def backward_bytes(
    config: MPTConfig, tokens: int, every: int, product_bytes: int = 2, stream_bytes: int = 2
) -> int:
    """Bytes that come on top while the last block, which is the first to go, goes backwards.

    A gradient inside the MLP and two of the residual stream; where blocks are recomputed, all
    that one of them keeps. Its input is there already, if the first norm reads it as it is.
    Arguments as for `kept_bytes`.
    """
    of_stream = stream_bytes * config.d_model
    gradients = product_bytes * config.mlp_width + 2 * of_stream
    if not every:
        return tokens * gradients
    low = config.norm_type.startswith("low_precision")
    as_it_is = stream_bytes == (product_bytes if low else FLOAT)
    block = sum(kept_by_block(config, product_bytes).values()) - as_it_is * of_stream
    return tokens * (gradients + block)
