"""Attention of a sequence to itself: both ways or causal, over all of it or chunk by chunk, with rotary positions.

Shapes: B sequences, L steps, D width, a heads, c channels of a head.
"""

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.sequences.positions import rotary


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(c)) v by heads, between linear layers (Vaswani et al., 2017, arXiv 1706.03762).

    Args:
        width: D, a multiple of `heads`.
        causal: a step sees those before it and itself alone.
        window: steps of a chunk, which sees itself and both chunks beside it (of a causal network the one before);
            None lets each step see all. Time and memory then grow with L times the window. One call of torch's
            attention for each chunk, on views: no keys are copied.
        turns: whether queries and keys are turned by their positions (rotary), else positions are not used here.
    Raises: UserError for a width that its heads do not divide (into even heads, where they are turned), or a window
        below 1.
    """

    def __init__(
        self, width: int, heads: int, causal: bool = False, window: int | None = None, turns: bool = False
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads or (turns and width // heads % 2):
            raise UserError(f"width={width} must split into heads={heads} parts" + (" of even size" if turns else ""))
        if window is not None and window < 1:
            raise UserError(f"window={window} must be at least 1; None attends to the whole sequence")
        self.heads, self.causal, self.window, self.turns = heads, causal, window, turns
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, own_BL: Tensor | None = None) -> Tensor:
        """[B L D].

        Args:
            own_BL: bool, which steps are a sequence's own; none looks at the others. None: all.
        """
        q_BaLc, k_BaLc, v_BaLc = self.qkv(x_BLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        length = x_BLD.shape[1]
        if self.turns:
            table = rotary([max(length, 1)], q_BaLc.shape[3], device=x_BLD.device)[:length].to(q_BaLc.dtype)
            q_BaLc, k_BaLc = (apply_rot_embed_cat(x_BaLc, table) for x_BaLc in (q_BaLc, k_BaLc))
        window = self.window or max(length, 1)
        parts = []
        for start in range(0, length, window):
            first, last = max(0, start - window), min(length, start + (1 if self.causal else 2) * window)
            query_BaQc = q_BaLc[:, :, start : start + window]
            keys = k_BaLc[:, :, first:last], v_BaLc[:, :, first:last]
            own_BS = None if own_BL is None else own_BL[:, first:last]
            parts.append(self._attend(query_BaQc, *keys, own_BS, start - first))
        mixed_BaLc = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] if parts else v_BaLc
        return self.out(mixed_BaLc.transpose(1, 2).flatten(2))

    def _attend(self, q_BaQc: Tensor, k_BaSc: Tensor, v_BaSc: Tensor, own_BS: Tensor | None, before: int) -> Tensor:
        """Of the queries at steps `before` to before + Q of the keys."""
        if own_BS is None and (not self.causal or not before):
            return F.scaled_dot_product_attention(q_BaQc, k_BaSc, v_BaSc, is_causal=self.causal)
        place_S = torch.arange(k_BaSc.shape[2], device=k_BaSc.device)
        place_Q1 = torch.arange(q_BaQc.shape[2], device=k_BaSc.device)[:, None] + before
        seen = place_S <= place_Q1 if self.causal else place_S >= 0
        if own_BS is not None:
            # A step that sees no key would have NaN: it sees itself, or the first ones, and nobody looks at it.
            seen = seen & own_BS[:, None, None]
            seen = seen | ~seen.any(dim=3, keepdim=True) & (place_S <= place_Q1)
        return F.scaled_dot_product_attention(q_BaQc, k_BaSc, v_BaSc, attn_mask=seen)
