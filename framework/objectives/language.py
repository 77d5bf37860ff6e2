"""Language-modelling objectives. Shapes: B sequences, T positions, V vocabulary."""

import torch
from torch import Tensor
from torch.nn import functional as F


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each position's target, in float32 where the logits are no wider; 0 of none."""
    wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    reduction = "mean" if targets_BT.numel() else "sum"
    return F.cross_entropy(wide_BTV.flatten(0, 1), targets_BT.flatten(), reduction=reduction)
