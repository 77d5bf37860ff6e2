"""What one network gives of a sample, predicted from what another gives of it.

Source: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733, equation 2.
Shapes: B rows of this rank, D width.
"""

from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.unit_length import unit_length
from lightspan.objectives.means import known_mean, mean


def prediction_distance(guess_BD: Tensor, target_BD: Tensor, known_B: Tensor | None = None) -> Tensor:
    """Mean over the rows of all ranks of |g/|g| - t/|t||^2 = 2 - 2 cos(g, t), a scalar in [0, 4] in float32 or wider
    (eq. 2).

    Targets carry no gradient. A row of zeros has the distance 2 from all; without rows the loss is 0.

    Args:
        known_B: bool, the rows over which the mean runs; None is all.
    """
    cosine_B = (unit_length(wide(guess_BD)) * unit_length(wide(target_BD.detach()))).sum(dim=1)
    return mean(2 - 2 * cosine_B) if known_B is None else known_mean(2 - 2 * cosine_B, known_B)
