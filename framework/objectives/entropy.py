"""The entropy of predictions: what may be made small without a label, and how unsure a prediction is.

Shapes: B batch of this rank, C classes.
"""

from torch import Tensor

from lightspan.core.devices import wide
from lightspan.objectives.means import mean


def prediction_entropy(logits_BC: Tensor) -> Tensor:
    """Mean over the rows of all ranks of H(softmax(logits)), in nats, in [0, log C]; 0, with a gradient of 0, of none.

    Source: the loss of AdaMerging, arXiv 2310.02575, and of test-time adaptation, arXiv 2006.10726.
    A probability that is 0 in the precision at hand adds nothing. Computed in float32 or wider.
    """
    log_p_BC = wide(logits_BC).log_softmax(dim=1)
    entropy_B = -(log_p_BC.exp() * log_p_BC).sum(dim=1)
    return mean(entropy_B)
