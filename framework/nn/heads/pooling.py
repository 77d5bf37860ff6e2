"""One vector from a sequence. Shapes: B sequences, T positions, D width."""

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide, wide_type
from lightspan.core.ranges import require_in


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the positions whose mask is not 0, in the dtype of `x`: [B D]. A row without any gives zeros.

    Counted and summed in float32 or wider: bfloat16 has no 257. Masked positions have no effect, even if NaN or
    infinite.
    """
    in_mask_BT1 = (mask_BT != 0).unsqueeze(-1)
    total_BD = x_BTD.where(in_mask_BT1, 0).sum(dim=1, dtype=wide_type(x_BTD.dtype))
    return (total_BD / in_mask_BT1.sum(dim=1).clamp_min(1)).to(x_BTD.dtype)


class GeM(nn.Module):
    """The generalised mean over positions, (mean of max(x, least)^p)^(1/p): [B T D] -> [B D], in float32 or wider.

    At p = 1 it is the mean of what is above `least`, for large p it tends to the maximum. Features below `least` count
    as that, and have no gradient.

    Source: Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, arXiv 1711.02512,
    equation 3, with one p for all features.

    Args:
        p: where the exponent starts, above 0; it is trained.
        least: above 0.
    """

    def __init__(self, p: float = 3.0, least: float = 1e-6) -> None:
        super().__init__()
        require_in("(0, inf)", p=p, least=least)
        self.p, self.least = nn.Parameter(torch.full((1,), float(p))), least  # FSDP2 splits no scalar

    def forward(self, x_BTD: Tensor) -> Tensor:
        with torch.autocast(x_BTD.device.type, enabled=False):
            p = wide(self.p)
            return wide(x_BTD).clamp_min(self.least).pow(p).mean(dim=1).pow(1 / p)
