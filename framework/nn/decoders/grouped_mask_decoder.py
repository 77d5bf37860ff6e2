"""A decoder of pictures whose bands are in groups, each with tokens of its own.

Source: Cong et al., "SatMAE", 2022, arXiv 2207.08051, section 3.3, and the code of SatMAE++ (arXiv 2403.05419).
Shapes: B batch, P prefix tokens, K places seen, M places asked for, G groups, L places of each, D width of the encoder,
w of the decoder, n numbers of a patch of a group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.decoders.mask_decoder import MaskTransformer
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.sequences.patches import at_places
from lightspan.nn.sequences.positions import sincos


class GroupedMaskDecoder(MaskTransformer):
    """Guesses of every token, seen or hidden, by a linear layer for each group.

    Args:
        in_features, width, depth, heads: see `MaskTransformer`.
        group_width: channels of the positions that tell the group, a multiple of 2; the others, a multiple of 4, tell
            the place. Prefix tokens get the code of one further group. 0 is for a single group.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self, in_features: int, width: int = 512, depth: int = 8, heads: int = 16, group_width: int = 128
    ) -> None:
        super().__init__(in_features, width, depth, heads, axis_widths(width, group_width))
        self.group_width = group_width
        self.group_heads = nn.ModuleList()

    def build(self, numbers: Sequence[int]) -> None:
        """Makes the linear layers: n of each group."""
        self.group_heads.extend(nn.Linear(self.width, count) for count in numbers)
        xavier_uniform_(self)

    def forward(self, tokens_BSD: Tensor, at_BK: Tensor, ask_BM: Tensor, grid: Sequence[int]) -> list[Tensor]:
        """[B L n] of each group, row by row. Each place is in `at_BK` or in `ask_BM`, counted group by group."""
        x_BSw, prefix = self.sequence(tokens_BSD, at_BK, ask_BM, grid), tokens_BSD.shape[1] - at_BK.shape[1]
        if self.group_width:
            code_w = sincos((len(self.group_heads) + 1,), self.group_width, device=x_BSw.device)[-1]
            code_w = torch.cat([code_w.new_zeros(self.width - self.group_width), code_w]).to(x_BSw.dtype)
            x_BSw = torch.cat([x_BSw[:, :prefix] + code_w, x_BSw[:, prefix:]], dim=1)
        x_BTw = self.norm(self.blocks(x_BSw))[:, prefix:]
        in_order_BTw = at_places(x_BTw, torch.cat([at_BK, ask_BM], dim=1).argsort(dim=1))
        # Of a batch without rows the places are unknown, and so is their number.
        in_order_BTw = F.pad(in_order_BTw, (0, 0, 0, math.prod(grid) - in_order_BTw.shape[1]))
        parts = in_order_BTw.unflatten(1, (len(self.group_heads), -1)).unbind(1)
        return [head(part_BLw) for head, part_BLw in zip(self.group_heads, parts, strict=True)]


def axis_widths(width: int, group_width: int) -> tuple[int, int, int]:
    """Channels of the positions of group, row and column. Raises: UserError for widths that are not whole."""
    rest = width - group_width
    if group_width < 0 or group_width % 2 or rest < 4 or rest % 4:
        raise UserError(
            f"group_width={group_width} must be a multiple of 2, and leave a multiple of 4 above 0 of width={width}"
        )
    return group_width, rest // 2, rest // 2
