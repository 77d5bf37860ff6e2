"""A decoder that guesses patches from those that were seen, by self-attention: MAE's, and the predictor of I-JEPA.

Source: He et al., "MAE", 2021, arXiv 2111.06377, section 3; Assran et al., "I-JEPA", 2023, arXiv 2301.08243,
section 3.
Shapes: B batch, P prefix tokens, K places seen, M places asked for, D width of the encoder, w of the decoder, o
outputs.
"""

from collections.abc import Sequence

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.decoders.masked_sequence import MaskedSequence
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.widths import LazyHead


class MaskTransformer(nn.Module):
    """Blocks of self-attention over what was seen and mask tokens, then a norm.

    Args:
        in_features: D.
        width, depth, heads: of the blocks; MAE's are 512, 8 and 16. Width is a multiple of heads and of 4 (two axes).
        axis_widths: channels of the positions of each axis of the grid, see `MaskedSequence`.
        dropout: in the blocks, of attention and behind it and both layers of the MLP, in [0, 1).
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        heads: int,
        axis_widths: Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_in("[0, 1)", dropout=dropout)
        if min(in_features, width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"{type(self).__name__}: width={width} must be a multiple of heads={heads}, and all and depth={depth} "
                f"and in_features={in_features} above 0"
            )
        if axis_widths is not None and sum(axis_widths) != width:
            raise UserError(f"{type(self).__name__}: axis_widths={[*axis_widths]} must sum to width={width}")
        self.in_features, self.width = in_features, width
        self.sequence = MaskedSequence(in_features, width, axis_widths)
        drops = {"proj_drop": dropout, "attn_drop": dropout}
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, **drops) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)


class MaskDecoder(LazyHead, MaskTransformer):
    """A `MaskTransformer` and a linear layer.

    Args:
        in_features, width, depth, heads, axis_widths: of the transformer.
        out_features: o; None leaves it to the method: MAE's are the numbers of a patch, and I-JEPA's are D.
    Raises: UserError for sizes that do not fit.
    """

    head: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        axis_widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_features, width, depth, heads, axis_widths)
        if out_features is not None:
            self.build(out_features)

    def make_outputs(self, count: int) -> None:
        self.head = nn.Linear(self.width, count)
        xavier_uniform_(self)

    def forward(self, tokens_BSD: Tensor, at_BK: Tensor, ask_BM: Tensor, grid: Sequence[int]) -> Tensor:
        """[B M o], in the order of `ask_BM`; see `MaskedSequence`."""
        self.require_outputs()
        x_BLw = self.norm(self.blocks(self.sequence(tokens_BSD, at_BK, ask_BM, grid)))
        return self.head(x_BLw[:, x_BLw.shape[1] - ask_BM.shape[1] :])
