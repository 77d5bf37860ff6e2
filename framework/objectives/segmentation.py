"""How far guesses of a class for each voxel are from the truth. Shapes: B samples, K classes, N axes of a sample."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.objectives.means import known_mean

SMOOTH = 1e-5


def dice_loss(logits_BKN: Tensor, label_BN: Tensor) -> Tensor:
    """1 - (2 sum p t + s) / (sum p + sum t + s) with the probabilities p and the truth t of a class and s = 1e-5, mean
    over the classes and samples of all ranks, a scalar in float32 or wider (Milletari et al., "V-Net", 2016, arXiv
    1606.04797, with sums in the place of squares, as MONAI's DiceLoss). A class that a sample does not have counts: its
    loss is near 1 where it is guessed, near 0 where it is not.

    Args:
        label_BN: int64; voxels below 0 are left out, and samples without any other.
    """
    known_BN = label_BN >= 0
    p_BKN = wide(logits_BKN).softmax(dim=1) * known_BN[:, None]
    t_BNK = F.one_hot(label_BN.clamp_min(0), logits_BKN.shape[1])
    t_BKN = t_BNK.movedim(-1, 1).to(p_BKN.dtype) * known_BN[:, None]
    overlap_BK, sizes_BK = ((x.flatten(2).sum(dim=2)) for x in (p_BKN * t_BKN, p_BKN + t_BKN))
    loss_BK = 1 - (2 * overlap_BK + SMOOTH) / (sizes_BK + SMOOTH)
    return known_mean(loss_BK, known_BN.flatten(1).any(dim=1)[:, None])


def voxel_cross_entropy(logits_BKN: Tensor, label_BN: Tensor) -> Tensor:
    """In nats, mean over the voxels of all ranks whose label is not below 0, a scalar in float32 or wider."""
    loss_BN = F.cross_entropy(wide(logits_BKN), label_BN.clamp_min(-1), ignore_index=-1, reduction="none")
    return known_mean(loss_BN, label_BN >= 0)


def dice_and_cross_entropy(logits_BKN: Tensor, label_BN: Tensor) -> dict[str, Tensor]:
    """`dice` and `nats`, the two losses of segmentation that are used together; their mean is the usual objective."""
    return {"dice": dice_loss(logits_BKN, label_BN), "nats": voxel_cross_entropy(logits_BKN, label_BN)}


def deep_supervision(logits: list[Tensor], label_BN: Tensor) -> dict[str, Tensor]:
    """`dice_and_cross_entropy` of guesses at several scales, each enlarged linearly to the labels' size, mean over the
    scales (Lee et al., "Deeply-Supervised Nets", 2015, arXiv 1409.5185).
    """
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    enlarged = [
        each if each.shape[2:] == label_BN.shape[1:] else F.interpolate(each, label_BN.shape[1:], mode=modes[each.ndim])
        for each in logits
    ]
    found = [dice_and_cross_entropy(each, label_BN) for each in enlarged]
    return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
