"""One vector from a sequence. Shapes: B sequences, T positions, D width."""

from torch import Tensor

from lightspan.core.devices import wide_type


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the positions whose mask is not 0, in the dtype of `x`: [B D]. A row without any gives zeros.

    Counted and summed in float32 or wider: bfloat16 has no 257. Masked positions have no effect, even if NaN or
    infinite.
    """
    in_mask_BT1 = (mask_BT != 0).unsqueeze(-1)
    total_BD = x_BTD.where(in_mask_BT1, 0).sum(dim=1, dtype=wide_type(x_BTD.dtype))
    return (total_BD / in_mask_BT1.sum(dim=1).clamp_min(1)).to(x_BTD.dtype)
