"""A decoder that guesses hidden patches of one view with the help of another, by cross-attention.

Source: Weinzaepfel et al., "CroCo", 2022, arXiv 2210.10716 (`SelfFirst`); Eymael et al., "CropMAE", 2024, arXiv
2403.17823 (`CrossFirst`).
Shapes: B batch, P prefix tokens, K places seen, M places asked for, R places of the other view, D width of the encoder,
w of the decoder, o outputs.
"""

from collections.abc import Callable, Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lightspan.core.ranges import require_in
from lightspan.nn.decoders.masked_sequence import MaskedSequence, positions
from lightspan.nn.init import xavier_uniform_
from lightspan.nn.sequences.attention import MultiHeadAttention
from lightspan.nn.widths import LazyHead

CrossBlockCallable = Callable[[int], nn.Module]
"""Called with a width; gives a block (x [B L w], other [B S w]) -> [B L w]."""


class SelfFirst(nn.Module):
    """x += self-attention(norm x); x += cross-attention(norm x, norm y); x += MLP(norm x): CroCo's block.

    Args:
        width: w, a multiple of `heads`.
        mlp_ratio: width of the MLP by w.
    """

    def __init__(self, width: int, heads: int = 16, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm_own, self.norm_cross = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.norm_other, self.norm_mlp = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.own, self.cross = MultiHeadAttention(width, heads), MultiHeadAttention(width, heads)
        self.mlp = Mlp(width, int(mlp_ratio * width))

    def forward(self, x_BLw: Tensor, other_BSw: Tensor) -> Tensor:
        own_BLw, y_BSw = self.norm_own(x_BLw), self.norm_other(other_BSw)
        x_BLw = x_BLw + self.own(own_BLw, own_BLw, own_BLw)
        x_BLw = x_BLw + self.cross(self.norm_cross(x_BLw), y_BSw, y_BSw)
        return x_BLw + self.mlp(self.norm_mlp(x_BLw))


class CrossFirst(nn.Module):
    """x = norm(x + cross-attention(x, y)); x = norm(x + MLP(x)); x = norm(x + self-attention(x)): CropMAE's block.

    Args:
        width: w, a multiple of `heads`.
        mlp_width: of the MLP; the authors' code has 2048 at every w.
        dropout: of attention weights, of the MLP and of each branch, in [0, 1); 0.1 in the authors' code.
    """

    def __init__(self, width: int, heads: int = 8, mlp_width: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm_cross, self.norm_mlp, self.norm_own = (nn.LayerNorm(width) for _ in range(3))
        self.cross = MultiHeadAttention(width, heads, dropout=dropout)
        self.own = MultiHeadAttention(width, heads, dropout=dropout)
        self.mlp = Mlp(width, mlp_width, act_layer=nn.ReLU, drop=(dropout, 0.0))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BLw: Tensor, other_BSw: Tensor) -> Tensor:
        x_BLw = self.norm_cross(x_BLw + self.drop(self.cross(x_BLw, other_BSw, other_BSw)))
        x_BLw = self.norm_mlp(x_BLw + self.drop(self.mlp(x_BLw)))
        return self.norm_own(x_BLw + self.drop(self.own(x_BLw, x_BLw, x_BLw)))


class CrossDecoder(LazyHead):
    """Blocks over what was seen of a view and mask tokens, which look at the tokens of another view; then a norm and a
    linear layer. One linear layer brings the tokens of both views to the decoder's width.

    Args:
        in_features: D.
        out_features: o; None leaves it to the method.
        width: w, a multiple of 4.
        depth: blocks, at least 1.
        block: called with `width`, such as `SelfFirst` or `CrossFirst`; the recipe binds its other settings.
        place_other: whether the other view's tokens too get the positions of the decoder, as in CroCo; CropMAE leaves
            them with those of the encoder.
    Raises: UserError for sizes that do not fit.
    """

    head: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        width: int = 512,
        depth: int = 8,
        block: CrossBlockCallable = SelfFirst,
        place_other: bool = True,
    ) -> None:
        super().__init__()
        require_in("[1, inf)", width=width, depth=depth, in_features=in_features)
        self.in_features, self.width, self.place_other = in_features, width, place_other
        self.sequence = MaskedSequence(in_features, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if out_features is not None:
            self.build(out_features)

    def make_outputs(self, count: int) -> None:
        self.head = nn.Linear(self.width, count)
        xavier_uniform_(self)

    def decode(
        self, tokens_BSD: Tensor, at_BK: Tensor, ask_BM: Tensor, other_BUD: Tensor, grid: Sequence[int]
    ) -> Tensor:
        """[B P+K+M w] after the last norm: all that was seen, then what was asked for.

        With all places seen and none asked for it is the network for tasks on pairs of views (CroCo).

        Args:
            other_BUD: the other view's tokens, P prefix tokens and all T of the same grid.
        """
        x_BLw = self.sequence(tokens_BSD, at_BK, ask_BM, grid)
        other_BUw = self.sequence.embed(other_BUD)
        if self.place_other:
            places_BTw = positions(other_BUw, grid)
            prefix = other_BUw.shape[1] - places_BTw.shape[1]
            other_BUw = torch.cat([other_BUw[:, :prefix], other_BUw[:, prefix:] + places_BTw], dim=1)
        for block in self.blocks:
            x_BLw = block(x_BLw, other_BUw)
        return self.norm(x_BLw)

    def forward(
        self, tokens_BSD: Tensor, at_BK: Tensor, ask_BM: Tensor, other_BUD: Tensor, grid: Sequence[int]
    ) -> Tensor:
        """[B M o], in the order of `ask_BM`; arguments as in `decode`."""
        self.require_outputs()
        x_BLw = self.decode(tokens_BSD, at_BK, ask_BM, other_BUD, grid)
        return self.head(x_BLw[:, x_BLw.shape[1] - ask_BM.shape[1] :])
