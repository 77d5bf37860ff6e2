"""An encoder of maps for `lightspan.backbones.dense.EncodedMaps`, in a file of its own since transformers takes seconds
to import.

Shapes: B images, C channels, H W image.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import SegformerConfig, SegformerModel

from lightspan.core.errors import UserError

# A recipe may name the class listed here.
__all__ = ["MixTransformer"]


class MixTransformer(nn.Module):
    """SegFormer's encoder as transformers has it: four maps, of a quarter of the image's sides to a thirty-second. The
    defaults are MiT-B5's.

    Args:
        depths: blocks of each level.
        widths: of each level, multiples of `heads`.
        heads: of each level.
        drop_path: share of the last block's stochastic depth, which grows with depth.
        in_chans: image channels.
    Raises: UserError for other numbers of levels than four.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 6, 40, 3),
        widths: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        drop_path: float = 0.1,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        levels = zip(widths, heads, strict=False)
        if {len(depths), len(widths), len(heads)} != {4} or any(width % of for width, of in levels):
            raise UserError(
                f"MixTransformer depths={[*depths]}, widths={[*widths]} and heads={[*heads]} must have four numbers "
                "each, and each width must be a multiple of its heads"
            )
        self.widths = tuple(widths)
        self.network = SegformerModel(
            SegformerConfig(
                num_channels=in_chans,
                depths=[*depths],
                hidden_sizes=[*widths],
                num_attention_heads=[*heads],
                drop_path_rate=drop_path,
            )
        )

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = self.network(x_BCHW, output_hidden_states=True).hidden_states
        return maps
