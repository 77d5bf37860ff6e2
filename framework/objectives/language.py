"""Language-modelling objectives. Shapes: B sequences, T positions, V vocabulary."""

from torch import Tensor

from lightspan.objectives.classes import known_cross_entropy, label_cross_entropy


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, known_BT: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of each position's target, in float32 unless logits are wider; 0 if there are none.

    Args:
        known_BT: bool; targets elsewhere, such as padding, are not learned, and the mean is over the known ones of all
            ranks. None is all of this rank.
    """
    if known_BT is None:
        return label_cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return known_cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), known_BT.flatten())
