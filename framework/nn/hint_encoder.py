"""A condition that is a picture, as something to add to a map of features: an adapter that begins with nothing.

Source: Zhang, Rao, Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023, arXiv
2302.05543 (layers that start at zero); Guo et al., "High-Fidelity Relightable Monocular Portrait Animation with
Lighting-Controllable Video Diffusion Model", CVPR 2025, arXiv 2502.19894 (sizes, and the scalar).
Shapes: N pictures, H W sides, h w sides of the map, D its channels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.ranges import require_in


class HintEncoder(nn.Module):
    """[N in_chans H W] -> [N out_chans h w]: convolutions with SiLU, then a layer of 1 x 1 pixels that starts at zero,
    times a learned number. So a network to whose features this is added starts as the network that it was.

    Args:
        out_chans: D, at least 1.
        in_chans: at least 1.
        widths: of the convolutions, at least one.
        halvings: how often sides are halved, rounded up, by the last steps from one width to the next; in
            [0, len(widths) - 1]. A hint in pixels for latents of an eighth needs 3.
        scale: where the learned number starts.
    Raises: UserError for numbers outside of these.
    """

    def __init__(
        self,
        out_chans: int,
        in_chans: int = 3,
        widths: Sequence[int] = (16, 32, 64, 128),
        halvings: int = 3,
        scale: float = 2.0,
    ) -> None:
        super().__init__()
        require_in("[1, inf)", out_chans=out_chans, in_chans=in_chans, widths=widths, **{"len(widths)": len(widths)})
        require_in(f"[0, {len(widths) - 1}]", halvings=halvings)
        self.out_chans, self.in_chans = out_chans, in_chans
        strides = [1] * (len(widths) - 1 - halvings) + [2] * halvings
        self.first = nn.Conv2d(in_chans, widths[0], 3, padding=1)
        self.steps = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=stride, padding=1)
            for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.last = nn.Conv2d(widths[-1], out_chans, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.full((1,), scale))  # FSDP2 splits no scalar

    def forward(self, hint_NCHW: Tensor) -> Tensor:
        x = F.silu(self.first(hint_NCHW))
        for step in self.steps:
            x = F.silu(step(x))
        return self.scale[:, None, None] * self.last(x)
