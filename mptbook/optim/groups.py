"""Which weights decay: matrices do, vectors do not."""

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float, embedding_lr: float = 1.0) -> list[dict]:
    """Parameter groups: matrices with `weight_decay`, norms and biases without.

    Decay pulls a weight towards 0. A norm's weight starts at 1 and a bias shifts a mean:
    neither should be pulled.

    Args:
        embedding_lr: what `train_steps` multiplies the learning rate of embeddings with; if
            that is not 1, they are a group of their own.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    apart = embedding_lr != 1
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and apart}
    matrices = [p for p in weights if p.dim() >= 2 and p not in tables]
    embeddings = [p for p in weights if p in tables]
    vectors = [p for p in weights if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": embeddings, "weight_decay": weight_decay, "lr_factor": embedding_lr},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
