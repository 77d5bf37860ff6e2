"""The sequence that a decoder starts from: what an encoder saw, and mask tokens where it is asked to guess.

Shapes: B batch, P prefix tokens, K places seen, M places asked for, D width of the encoder, w of the decoder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightspan.nn.sequences.patches import at_places
from lightspan.nn.sequences.positions import sincos, sincos_by_axis


class MaskedSequence(nn.Module):
    """Tokens of an encoder at the decoder's width, then one learned token at each place asked for, with positions.

    Positions are fixed sines and cosines of the places, so that the order of tokens carries nothing.

    Args:
        in_features: D.
        width: w, a multiple of 2 for each axis of the grid.
        axis_widths: channels of the positions of each axis of the grid, which sum to w; None shares them evenly.
    """

    def __init__(self, in_features: int, width: int, axis_widths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.axis_widths = axis_widths
        self.embed = nn.Linear(in_features, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)  # MAE's start

    def forward(
        self,
        tokens_BSD: Tensor,
        at_BK: Tensor,
        ask_BM: Tensor,
        grid: Sequence[int],
        known_BK: Tensor | None = None,
    ) -> Tensor:
        """[B P+K+M w]. The first P = S - K tokens have no position.

        Args:
            at_BK, ask_BM: int64, places counted row by row.
            known_BK: bool, False for the tokens of places about which nothing is known: each gives way to a mask token.
                None: all are known.
        """
        seen_BSw = self.embed(tokens_BSD)
        positions_BTw = positions(seen_BSw, grid, self.axis_widths)
        prefix = tokens_BSD.shape[1] - at_BK.shape[1]
        prefix_BPw, seen_BKw, mask_w = seen_BSw[:, :prefix], seen_BSw[:, prefix:], self.mask_token.to(seen_BSw.dtype)
        if known_BK is not None:
            seen_BKw = seen_BKw.where(known_BK[..., None], mask_w)
        parts = [(seen_BKw, at_BK), (mask_w, ask_BM)]
        return torch.cat([prefix_BPw, *(part + at_places(positions_BTw, places) for part, places in parts)], dim=1)


def positions(like_BSw: Tensor, grid: Sequence[int], axis_widths: Sequence[int] | None = None) -> Tensor:
    """Sines and cosines of a grid, [B T w], for tokens of this width, on their device and in their type.

    Args:
        axis_widths: see `MaskedSequence`.
    """
    if axis_widths is None:
        table_Tw = sincos(grid, like_BSw.shape[2], device=like_BSw.device)
    else:
        table_Tw = sincos_by_axis(grid, axis_widths, device=like_BSw.device)
    return table_Tw.to(like_BSw.dtype).expand(like_BSw.shape[0], -1, -1)
