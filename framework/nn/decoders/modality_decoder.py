"""A decoder of volumes whose registered modalities have tokens of their own.

Source: "BM-MAE", 2025, arXiv 2505.00568, and its code, which has the sizes and the dropout.
Shapes: B batch, P prefix tokens, K places seen, A places asked for, M modalities, D width of the encoder, w of the
decoder, n numbers of a patch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.decoders.mask_decoder import MaskTransformer
from lightspan.nn.init import xavier_uniform_


class ModalityDecoder(MaskTransformer):
    """Guesses of every token, seen or not, on a grid whose first axis is the modality, by one linear layer for all.

    Positions are fixed and those of the place alone; a learned vector tells the modality.

    Args:
        in_features, width, depth, heads, dropout: see `MaskTransformer`. Width is a multiple of 2 for each axis.
        axes: of the places, 1 to 3.
    Raises: UserError for sizes that do not fit.
    """

    parameter_kinds = {"code_Mw": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups
    code_Mw: nn.Parameter
    head: nn.Linear

    def __init__(
        self, in_features: int, width: int = 384, depth: int = 3, heads: int = 12, axes: int = 3, dropout: float = 0.1
    ) -> None:
        super().__init__(in_features, width, depth, heads, widths_of_places(width, axes), dropout)
        self.axes = axes

    def build(self, modalities: int, numbers: int) -> None:
        """Makes the modalities' vectors and the linear layer, of n outputs."""
        self.code_Mw = nn.Parameter(0.02 * torch.randn(modalities, self.width))
        self.head = nn.Linear(self.width, numbers)
        xavier_uniform_(self)

    def forward(
        self, tokens_BSD: Tensor, at_BK: Tensor, ask_BA: Tensor, grid: Sequence[int], known_BK: Tensor | None = None
    ) -> Tensor:
        """[B K+A n]: of the places seen, then of those asked for. Arguments as in `MaskedSequence`."""
        x_BLw, prefix = self.sequence(tokens_BSD, at_BK, ask_BA, grid, known_BK), tokens_BSD.shape[1] - at_BK.shape[1]
        modality_BT = torch.cat([at_BK, ask_BA], dim=1) // math.prod(grid[1:])
        coded_BTw = x_BLw[:, prefix:] + self.code_Mw.to(x_BLw.dtype)[modality_BT]
        return self.head(self.norm(self.blocks(torch.cat([x_BLw[:, :prefix], coded_BTw], dim=1)))[:, prefix:])


def widths_of_places(width: int, axes: int) -> tuple[int, ...]:
    """Channels of the positions of a grid whose first axis, the modality, leaves no trace in them.

    Raises: UserError for a width that the other axes cannot share.
    """
    if not 1 <= axes <= 3 or width < 1 or width % (2 * axes):
        raise UserError(f"width={width} must be a multiple of {2 * max(axes, 1)}, of positions of axes={axes} (1 to 3)")
    return 0, *[width // axes] * axes
