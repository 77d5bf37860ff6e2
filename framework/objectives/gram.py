"""Gram anchoring: the cosines between the patches of an image are to be those that an earlier network finds.

Source: Siméoni et al., "DINOv3", 2025, arXiv 2508.10104, section 4 (Gram anchoring): the squared Frobenius norm of
X_S X_S^T - X_G X_G^T, where the rows of X are patches at unit length. Here it is divided by the number of entries, as
in the authors' code; the paper's weights are for that mean.
Shapes: R images of this rank, T patches of each, w and v widths of the two networks.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.unit_length import unit_length
from lightspan.objectives.means import squared_error


def gram_loss(patches_RTw: Tensor, anchor_RTv: Tensor) -> Tensor:
    """Mean over the images of all ranks and pairs of patches of an image of the squared difference of their cosines, a
    scalar in [0, 4] in float32 or wider.

    It does not change if the features of either network are turned, nor with lengths; a patch of zeros has the cosine 0
    with all. Without an image it is 0.

    Args:
        anchor_RTv: of the same places, without a gradient; v may differ from w.
    """
    with torch.autocast(patches_RTw.device.type, enabled=False):
        cosines = [rows @ rows.mT for rows in (unit_length(wide(patches_RTw)), unit_length(wide(anchor_RTv.detach())))]
        return squared_error(*cosines)
