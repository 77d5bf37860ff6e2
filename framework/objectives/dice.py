"""How well the likely pixels of each class cover the true ones.

Source: Milletari, Navab, Ahmadi, "V-Net", 2016, arXiv 1606.04797, section 3, with the sums (and not the squares) of the
probabilities below the line and a constant on both sides, as in the code of VM-UNet (arXiv 2402.02491).
Shapes: B samples of this rank, K classes, sides of as many axes as samples have.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.objectives.means import mean


def dice_loss(logits_BK: Tensor, label_B: Tensor, smooth: float = 1.0) -> Tensor:
    """Mean over the samples of all ranks and all classes but the first, the ground, of

        1 - (2 sum_i p_i t_i + smooth) / (sum_i p_i + sum_i t_i + smooth)

    over the pixels i of a sample: p from the softmax over classes and t 1 where a class is the true one. A scalar in
    [0, 1) in float32 or wider; 0 without samples. A class that is neither there nor likely costs nothing, and neither
    does a sample without a known pixel.

    Args:
        logits_BK: [B K sides...], K at least 2.
        label_B: int64 [B sides...]; a pixel with one below 0 is in neither sum.
        smooth: above 0, in pixels.
    Raises: UserError for a single class.
    """
    if logits_BK.shape[1] < 2:
        raise UserError("Dice is that of classes beside the ground; there must be at least 2")
    p_BKn = wide(logits_BK).flatten(2).softmax(dim=1)[:, 1:]
    label_B1n, known_B1n = label_B.flatten(1)[:, None], label_B.flatten(1)[:, None] >= 0
    true_BKn = label_B1n == torch.arange(1, logits_BK.shape[1], device=label_B.device)[:, None]
    both_BK = p_BKn.where(true_BKn, 0).sum(dim=2)
    either_BK = p_BKn.where(known_B1n, 0).sum(dim=2) + true_BKn.sum(dim=2)
    return mean(1 - (2 * both_BK + smooth) / (either_BK + smooth))
