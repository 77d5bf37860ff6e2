"""Language-modelling objectives. Shapes: B sequences, T positions, V vocabulary."""

from torch import Tensor
from torch.nn import functional as F

from lightspan.devices import wide


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each position's target, in float32 unless logits are wider; 0 if there are none."""
    reduction = "mean" if targets_BT.numel() else "sum"
    return F.cross_entropy(wide(logits_BTV).flatten(0, 1), targets_BT.flatten(), reduction=reduction)
