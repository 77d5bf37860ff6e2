"""Language-modelling objectives. Shapes: B sequences, T positions, V vocabulary."""

from torch import Tensor

from lightspan.objectives.classes import label_cross_entropy


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each position's target, in float32 unless logits are wider; 0 if there are none."""
    return label_cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
