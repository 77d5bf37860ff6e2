"""Bottlenecks that train inside the blocks of a frozen transformer, and that change nothing before they have trained.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv 1902.00751, of the ones behind
a part; Chen et al., "AdaptFormer", NeurIPS 2022, arXiv 2205.13535, of those beside it. Lu et al., "SelaVPR", ICLR 2024,
arXiv 2402.14505, section 3.2, has both in each block:

    x <- x + A1(attention(norm1 x)),    A1(u) = u + W2 relu(W1 u)
    x <- x + mlp(norm2 x) + s A2(norm2 x),    A2(u) = W2 relu(W1 u)

Both W2 start at zero, with their biases. What the block has besides, such as LayerScale, applies to both sums.
Shapes: D width, the last axis.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


class Bottleneck(nn.Module):
    """W2 relu(W1 u) of [... D], 0 at the start.

    Args:
        width: D.
        hidden: of W1, at least 1.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        require_in("[1, inf)", width=width, hidden=hidden)
        self.down, self.relu, self.up = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, u: Tensor) -> Tensor:
        return self.up(self.relu(self.down(u)))


class Behind(nn.Module):
    """A part, and a bottleneck of what it gives added to that."""

    def __init__(self, part: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.part, self.bottleneck = part, Bottleneck(width, hidden)

    def forward(self, *args: Any, **options: Any) -> Tensor:
        u = self.part(*args, **options)
        return u + self.bottleneck(u)


class Beside(nn.Module):
    """A part, and a bottleneck of what goes into it, of which a share is added.

    Args:
        scale: the share, s.
    """

    def __init__(self, part: nn.Module, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.part, self.bottleneck, self.scale = part, Bottleneck(width, hidden), scale

    def forward(self, u: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.part(u, *args, **options) + self.scale * self.bottleneck(u)


def add_bottlenecks(blocks: Iterable[nn.Module], width: int, hidden: int, scale: float = 0.2) -> None:
    """Puts one behind the attention (`attn`) and one beside the MLP (`mlp`) of each block, in place.

    Raises: UserError for a block without these parts, or one that has bottlenecks already.
    """
    blocks = list(blocks)
    for block in blocks:
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module) or isinstance(attention, Behind):
            why = "has bottlenecks already" if isinstance(attention, Behind) else "has no parts attn and mlp"
            raise UserError(
                f"bottlenecks go into blocks of a transformer of timm, and {type(block).__name__} {why}; use "
                "lightspan.backbones.vit.vit, or lightspan.backbones.vit.TokenViT around a transformer of timm"
            )
    for block in blocks:
        block.attn = Behind(block.attn, width, hidden)  # type: ignore[arg-type]
        block.mlp = Beside(block.mlp, width, hidden, scale)  # type: ignore[arg-type]
