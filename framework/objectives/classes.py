"""One class of several for each row: how unlikely a network finds the right one, and how often its answer is right.

Shapes: R rows of this rank, K classes.
"""

from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.objectives.means import known_mean, mean_of, own_mean


def label_cross_entropy(logits_RK: Tensor, label_R: Tensor) -> Tensor:
    """Mean over the rows of all ranks of -log softmax(logits)[label], in nats, a scalar >= 0 in float32 or wider.

    Without rows it is 0, with gradient 0.

    Args:
        label_R: whole numbers in [0, K), or the shares of all classes, floats [R K]; a row of these counts as the mean
            over them.
    """
    logits_RK = wide(logits_RK)
    target = label_R.to(logits_RK) if label_R.is_floating_point() else label_R.long()
    return mean_of(F.cross_entropy(logits_RK, target, reduction="sum"), len(label_R))


def known_cross_entropy(logits_RK: Tensor, label_R: Tensor, known_R: Tensor) -> Tensor:
    """As `label_cross_entropy`, mean over the rows of all ranks whose label is known; 0 without any.

    Args:
        label_R: whole numbers in [0, K), also where they are not known.
        known_R: bool.
    """
    return known_mean(F.cross_entropy(wide(logits_RK), label_R.long(), reduction="none"), known_R)


def share_right(scores_RK: Tensor, label_R: Tensor) -> Tensor:
    """The share of this rank's rows whose largest score is that of their label, in [0, 1], float32; 0 without any."""
    return own_mean((scores_RK.argmax(dim=1) == label_R).float())
