"""Attention along a sequence to a few places that each sample chooses, between its steps too.

Source: Xia et al., "Vision Transformer with Deformable Attention" (DAT), CVPR 2022, arXiv 2201.00520, section 3.2, on
one axis, as Nguyen et al., AAAI 2023, arXiv 2212.01893, attend along the slices of a volume.
Shapes: B sequences, S steps, K = ceil(S / stride) keys, w width, a heads, c channels of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.sequences.attention import biased_attention


class DeformableAttention(nn.Module):
    """softmax(q k^T / sqrt(c) + bias) v by heads, of keys and values that lie where the queries say.

    Each head has a key every `stride` steps. Its place is the middle of these steps, moved by reach tanh(o) times the
    stride, where o comes from the head's queries around it: a convolution of each channel, GELU, and a linear map to
    one number. Features between two steps are interpolated linearly; places outside of the sequence are its ends. The
    bias is a small network of sign(d) log(1 + |d|), for the distance d in steps of a query and a key; it alone tells
    where a step is. Each head reads its own share of the channels of x, as do DAT's groups, and a sequence has any
    length from 1 step on.

    Differs from DAT: places outside are clamped, where it reads zeros. With stride 1, kernel 1 and reach 0 it is plain
    attention, but for the bias.

    Args:
        width: w, a multiple of `heads`.
        heads: a, each with places of its own.
        stride: steps for each key, at least 1.
        kernel: steps that the convolution reads, at least the stride.
        reach: how far a key may move, in strides, >= 0.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(self, width: int, heads: int = 8, stride: int = 4, kernel: int = 6, reach: float = 2.0) -> None:
        super().__init__()
        require_in("[1, inf)", width=width, heads=heads, stride=stride)
        require_in(f"[{stride}, inf)", kernel=kernel)
        require_in("[0, inf)", reach=reach)
        if width % heads:
            raise UserError(f"width={width} must be a multiple of heads={heads}")
        self.heads, self.stride, self.kernel, self.reach = heads, stride, kernel, reach
        part, hidden = width // heads, max(width // 4, 1)
        # Groups of a convolution of one step: a linear map of each head's own channels.
        self.query, self.key, self.value = (nn.Conv1d(width, width, 1, groups=heads, bias=False) for _ in range(3))
        self.around = nn.Conv1d(part, part, kernel, stride, groups=part)
        self.offset = nn.Conv1d(part, 1, 1, bias=False)
        layers = (nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.bias = nn.Sequential(*layers)
        self.out = nn.Linear(width, width)

    def places(self, q_NcS: Tensor) -> Tensor:
        """Where the keys of N = B a heads lie, in steps from 0 to S - 1, float32 or wider [N K]."""
        steps = q_NcS.shape[2]
        keys = math.ceil(steps / self.stride)
        before = (self.kernel - self.stride) // 2
        after = (keys - 1) * self.stride + self.kernel - before - steps
        moved_NK = wide(self.offset(F.gelu(self.around(F.pad(q_NcS, (before, after)))))[:, 0]).tanh()
        middle_K = torch.arange(keys, device=q_NcS.device) * self.stride + (self.stride - 1) / 2
        return (middle_K + self.reach * self.stride * moved_NK).clamp(0, steps - 1)

    def forward(self, x_BSw: Tensor) -> Tensor:
        """[B S w]."""
        x_BwS = x_BSw.transpose(1, 2)
        q_BwS = self.query(x_BwS)
        q_BacS = q_BwS.unflatten(1, (self.heads, -1))
        at_BaK = self.places(q_BacS.flatten(0, 1)).unflatten(0, q_BacS.shape[:2])
        found_BwK = between(x_BwS.unflatten(1, (self.heads, -1)), at_BaK).flatten(1, 2)
        k_BacK, v_BacK = (part(found_BwK).unflatten(1, (self.heads, -1)) for part in (self.key, self.value))
        apart_BaSK = torch.arange(x_BSw.shape[1], device=x_BSw.device)[:, None] - at_BaK[:, :, None]
        scaled_BaSK1 = (apart_BaSK.sign() * apart_BaSK.abs().log1p())[..., None].to(x_BSw.dtype)
        bias_BaSK = self.bias(scaled_BaSK1)[..., 0].to(q_BacS.dtype)
        q_BaSc, k_BaKc, v_BaKc = (part.transpose(2, 3) for part in (q_BacS, k_BacK, v_BacK))
        mixed_BaSc = biased_attention(q_BaSc, k_BaKc, v_BaKc, bias_BaSK)
        return self.out(mixed_BaSc.transpose(1, 2).flatten(2))


def between(x_BacS: Tensor, at_BaK: Tensor) -> Tensor:
    """Values of steps at places between them, linearly: [B a c K].

    Args:
        at_BaK: in [0, S - 1]; they have a gradient.
    """
    lower_BaK = at_BaK.detach().floor().clamp(0, x_BacS.shape[3] - 1)
    upper_BaK = (lower_BaK + 1).clamp_max(x_BacS.shape[3] - 1)
    share_Ba1K = (at_BaK - lower_BaK)[:, :, None].to(x_BacS.dtype)

    def of(step_BaK: Tensor) -> Tensor:
        return x_BacS.gather(3, step_BaK.long()[:, :, None].expand(-1, -1, x_BacS.shape[2], -1))

    return torch.lerp(of(lower_BaK), of(upper_BaK), share_Ba1K)
