"""Language-modelling objectives. Shapes: B sequences, T positions, V vocabulary."""

from torch import Tensor
from torch.nn import functional as F


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each position's target, in float32 whatever the logits' dtype."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
