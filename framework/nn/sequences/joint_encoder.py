"""One transformer over the tokens of several modalities, which so learn of each other.

Source: Chen et al., "PiMAE", 2023, arXiv 2303.08129, section 3.3: the shared encoder behind one for each modality.
Shapes: B samples, S tokens of a modality, D width.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.init import xavier_uniform_


class JointEncoder(nn.Module):
    """Adds a learned vector for each modality, then blocks of self-attention over the tokens of all, and a norm.

    Args:
        width: D, a multiple of heads.
        depth, heads: of the blocks.
        modalities: at least 1.
    Raises: UserError for sizes that do not fit.
    """

    parameter_kinds = {"code_MD": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(self, width: int = 384, depth: int = 3, heads: int = 6, modalities: int = 2) -> None:
        super().__init__()
        require_in("[1, inf)", modalities=modalities)
        if min(width, depth, heads) < 1 or width % heads:
            raise UserError(
                f"JointEncoder: width={width} must be a multiple of heads={heads}, and all and depth={depth} above 0"
            )
        self.width = width
        self.code_MD = nn.Parameter(0.02 * torch.randn(modalities, width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        xavier_uniform_(self.blocks)

    def forward(self, *tokens_BSD: Tensor) -> tuple[Tensor, ...]:
        """Of each modality [B S D], as many tokens as were given, in their order."""
        coded = [part + code.to(part.dtype) for part, code in zip(tokens_BSD, self.code_MD, strict=True)]
        joint_BLD = self.norm(self.blocks(torch.cat(coded, dim=1)))
        return joint_BLD.split([part.shape[1] for part in tokens_BSD], dim=1)
