"""A Transformer encoder of frames, such as those of a spectrogram: BERT's blocks on a linear map of each.

Source: Liu, Li, Lee, "TERA", 2020, arXiv 2007.06028, section III-B, and BERT (Devlin et al., 2018, arXiv 1810.04805),
whose blocks with the norm behind each branch it takes over.
Shapes: B sequences, T frames, F numbers of a frame, w width.
"""

from timm.layers import Mlp
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.nn.init import bert_normal_
from lightspan.nn.sequences.attention import MultiHeadAttention
from lightspan.nn.sequences.positions import sincos

# A recipe may name the classes listed here.
__all__ = ["FrameTransformer"]


class PostNormBlock(nn.Module):
    """x = norm(x + attention(x)), then x = norm(x + MLP(x)), with dropout of both branches.

    Args:
        attention: called with queries, keys and values, all of them x, and with what of them is seen.
    """

    def __init__(self, width: int, attention: nn.Module, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = Mlp(width, mlp_width, drop=(0.0, dropout))
        self.norm_attention, self.norm_mlp, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)

    def attend(self, x_BTw: Tensor, seen_B11T: Tensor | None) -> Tensor:
        return self.attention(x_BTw, x_BTw, x_BTw, seen_B11T)

    def forward(self, x_BTw: Tensor, seen_B11T: Tensor | None = None) -> Tensor:
        x_BTw = self.norm_attention(x_BTw + self.drop(self.attend(x_BTw, seen_B11T)))
        return self.norm_mlp(x_BTw + self.mlp(x_BTw))


class FrameTransformer(nn.Module):
    """Frames [B T F] and which of them are valid, bool [B T] -> the states of all, [B T w]; no state depends on a frame
    that is not valid, but those of such frames, which mean nothing.

    Positions are fixed sines and cosines of any length, added before a norm and dropout. Weights start as in
    `lightspan.nn.init.bert_normal_`.

    Args:
        bands: F.
        width: w, a multiple of `heads`, and even.
        depth, heads: blocks, and heads of each.
        mlp_width: of the hidden layer of each block; None is 4 w.
        dropout: in [0, 1).
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        bands: int = 80,
        width: int = 768,
        depth: int = 3,
        heads: int = 12,
        mlp_width: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(bands, depth) < 1 or width % 2:
            raise UserError(
                f"FrameTransformer bands={bands} and depth={depth} must be at least 1, and width={width} even"
            )
        self.bands, self.num_features = bands, width
        self.embed, self.norm, self.drop = nn.Linear(bands, width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(width, MultiHeadAttention(width, heads, dropout=dropout), mlp_width or 4 * width, dropout)
            for _ in range(depth)
        )
        bert_normal_(self, width)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """See `lightspan.nn.tokens`."""
        return [*self.blocks]

    def forward(self, frames_BTF: Tensor, valid_BT: Tensor) -> Tensor:
        x_BTw = self.embed(frames_BTF.to(self.embed.weight.dtype))
        place_Tw = sincos([x_BTw.shape[1]], self.num_features, device=x_BTw.device)
        x_BTw = self.drop(self.norm((wide(x_BTw) + place_Tw).to(x_BTw.dtype)))
        seen_B11T = valid_BT[:, None, None]
        for block in self.blocks:
            x_BTw = block(x_BTw, seen_B11T)
        return x_BTw
