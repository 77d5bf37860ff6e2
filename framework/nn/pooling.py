"""One vector from a sequence. Shapes: B sequences, T positions, D width."""

from torch import Tensor


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the positions whose mask is not 0: [B D]. A row without any gives zeros."""
    weight_BT1 = mask_BT.to(x_BTD.dtype).unsqueeze(-1)
    return (x_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp_min(1)
