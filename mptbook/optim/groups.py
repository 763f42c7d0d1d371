"""Which weights decay, and whose learning rate is a multiple of the others'."""

from torch import nn


def decay_groups(
    model: nn.Module, weight_decay: float, embedding_lr: float = 1.0, vector_lr: float = 1.0
) -> list[dict]:
    """Parameter groups: matrices and embeddings with `weight_decay`, vectors without.

    Vectors are the weights of norms, and biases. Decay pulls a weight towards 0. A norm's
    weight starts at 1 and a bias shifts a mean: neither should be pulled.

    Args:
        embedding_lr: what `train_steps` multiplies the learning rate of embeddings with.
        vector_lr: likewise of vectors.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in weights if p.dim() >= 2 and p not in tables]
    embeddings = [p for p in weights if p in tables]
    vectors = [p for p in weights if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": embeddings, "weight_decay": weight_decay, "lr_factor": embedding_lr},
        {"params": vectors, "weight_decay": 0.0, "lr_factor": vector_lr},
    ]
    return [group for group in groups if group["params"]]
