"""Tokens put among others, at a place of its own in each row.

Shapes: B rows, L tokens of a row, K tokens put among them, D width.
"""

import torch
from torch import Tensor

from lightspan.nn.sequences.patches import at_places


def spliced(x_BLD: Tensor, inner_BKD: Tensor, at_B: Tensor) -> Tensor:
    """Rows of L + K tokens: those of `x` before `at`, those of `inner`, and the rest of `x`.

    Args:
        x_BLD: L is at least 1.
        inner_BKD: of the same type; K is at least 1.
        at_B: int64, each in [0, L]: how many tokens of `x` come first.
    """
    L, K = x_BLD.shape[1], inner_BKD.shape[1]
    place_1S, at_B1 = torch.arange(L + K, device=x_BLD.device)[None], at_B[:, None]
    from_inner_BS = (place_1S - at_B1).clamp(0, K - 1)
    from_x_BS = torch.where(place_1S < at_B1, place_1S, place_1S - K).clamp(0, L - 1)
    inside_BS = (place_1S >= at_B1) & (place_1S < at_B1 + K)
    return torch.where(inside_BS[..., None], at_places(inner_BKD, from_inner_BS), at_places(x_BLD, from_x_BS))


def ended_alike(x_BLD: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """([B M D], int64 [B M]): the first `length` tokens of each row behind padding, so that all rows end at the last
    place, and 0 on the padding; M is the largest length. Continuing a text takes rows like these.
    """
    longest = int(length_B.max())
    place_BM = torch.arange(longest, device=x_BLD.device)[None] - (longest - length_B[:, None])
    return at_places(x_BLD, place_BM.clamp_min(0)), (place_BM >= 0).long()
