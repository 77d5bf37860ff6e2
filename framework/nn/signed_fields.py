"""Signed distances and colours anywhere in grids of features, and what rays see of them.

Source: Zhu et al., "PonderV2", 2023, arXiv 2310.08586, section 3.2, after NeuS (Wang et al., 2021, arXiv 2106.10689):
of the features at a place a perceptron makes the signed distance s and h; its slope n is the derivative of s by the
place, through the interpolation; a second one makes the colour of n, features, h and the direction of the ray.
All is computed in float32 or wider, whatever the precision of training: derivatives of derivatives leave the range of
lower ones.
Shapes: B scenes, R rays of each, S pieces of a ray, E = S + 1 ends, K finer ones, D H W voxels, N places.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in
from lightspan.nn.rendering import Rays, composited, crossing, cut_at, finer_ends, seen_by_opacity, surface_opacity
from lightspan.nn.trilinear import trilinear

COARSE_SHARPNESS = 64.0  # of the step that finds where pieces are cut finer


class WideLinear(nn.Linear):
    """In float32 or wider, whatever the type of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(wide(input), wide(self.weight), wide(self.bias))


class WidePerceptron(nn.Module):
    """Linear layers in float32 or wider, [... I] -> [... O].

    Args:
        sizes: of the input, hidden layers and the output.
        smooth: Softplus, with the published slope of 100, between layers, which has a second derivative; else ReLU.
    """

    def __init__(self, sizes: tuple[int, ...], smooth: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WideLinear(a, b) for a, b in pairwise(sizes))
        self.smooth = smooth

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        for number, layer in enumerate(self.layers):
            if number:
                x = F.softplus(x, beta=100) if self.smooth else x.relu()
            x = layer(x)
        return x


class RayView(NamedTuple):
    """What rays see, float32 or wider.

    colour: [B R 3] in (0, 1), before black. depth: [B R], length to what is seen. weight: [B R S].
    at, distance: [B R S], places of the middles of pieces, as lengths of rays, and the signed distances there.
    slope: [B R S 3], of the signed distance.
    crosses: bool [B R], whether a ray meets the scene's box; of another one the rest means nothing.
    """

    colour: Tensor
    depth: Tensor
    weight: Tensor
    at: Tensor
    distance: Tensor
    slope: Tensor
    crosses: Tensor


class SignedField(nn.Module):
    """Grids of features -> signed distances and colours.

    Args:
        geometry, appearance: channels of a grid that tell distances, the first ones, and those that tell colours.
        hidden: width of h, and of both perceptrons' one hidden layer.
        start: v at the beginning, of which exp(10 v) is the sharpness of surfaces; it is learned.
    """

    def __init__(self, geometry: int = 64, appearance: int = 64, hidden: int = 64, start: float = 0.3) -> None:
        super().__init__()
        require_in("[1, inf)", geometry=geometry, appearance=appearance, hidden=hidden)
        require_in("[-1, 1]", start=start)
        self.geometry, self.appearance = geometry, appearance
        self.shape = WidePerceptron((geometry, hidden, 1 + hidden), smooth=True)
        self.paint = WidePerceptron((3 + appearance + hidden + 3, hidden, 3), smooth=False)
        self.log_sharpness = nn.Parameter(torch.full((1,), start))  # FSDP2 splits no scalar

    @property
    def channels(self) -> int:
        """Of a grid."""
        return self.geometry + self.appearance

    def sharpness(self) -> Tensor:
        """Of surfaces, at most 1e6."""
        return (10 * wide(self.log_sharpness)).exp().clamp_max(1e6)[0]

    def distances(self, grid_BC: Tensor, half_B3: Tensor, at_BN3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(signed distance [B N], h [B N hidden], features [B N appearance]).

        Args:
            grid_BC: [B C D H W]. half_B3: half of the sides of the box around 0 that it fills.
            at_BN3: places in the unit of the box.
        """
        features_BNC = trilinear(wide(grid_BC), (at_BN3 / half_B3[:, None] + 1) / 2)
        told = self.shape(features_BNC[..., : self.geometry])
        return told[..., 0], told[..., 1:], features_BNC[..., self.geometry :]

    def slopes(self, grid_BC: Tensor, half_B3: Tensor, at_BN3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`distances` and, behind the first, the slope [B N 3], with gradients of its own if they are enabled."""
        learns = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # What inference mode made has no place in a graph; a copy has.
            grid_BC, half_B3, at_BN3 = (x.clone() if x.is_inference() else x for x in (grid_BC, half_B3, at_BN3))
            at_BN3 = at_BN3.detach().requires_grad_()
            distance_BN, inner, features = self.distances(grid_BC, half_B3, at_BN3)
            (slope_BN3,) = torch.autograd.grad(distance_BN.sum(), at_BN3, create_graph=learns)
        found = distance_BN, slope_BN3, inner, features
        return found if learns else tuple(part.detach() for part in found)  # type: ignore[return-value]

    def forward(
        self, grid_BC: Tensor, half_B3: Tensor, rays: Rays, pieces: int, jitter_BRS: Tensor, share_BRK: Tensor
    ) -> RayView:
        """What rays [B R 3] see inside of their scene's box.

        Args:
            grid_BC, half_B3: see `distances`.
            rays: in the unit of the box.
            pieces: into which a ray is cut first; K more ends are laid where it shows a surface.
            jitter_BRS: see `lightspan.nn.rendering.cut_at`. share_BRK: see `lightspan.nn.rendering.finer_ends`.
        """
        with torch.autocast(grid_BC.device.type, enabled=False):
            rays = Rays(wide(rays.origin), wide(rays.direction))
            half_B3 = wide(half_B3)
            near_BR, far_BR = crossing(rays, -half_B3[:, None], half_B3[:, None])
            crosses_BR = near_BR < far_BR
            # Of others both may be anything; at their origin all is finite, also derivatives.
            near_BR, far_BR = (end_BR.where(crosses_BR, 0) for end_BR in (near_BR, far_BR))

            def places(at_BRN: Tensor) -> Tensor:
                points = rays.origin[:, :, None] + at_BRN[..., None] * rays.direction[:, :, None]
                return points.flatten(1, 2)

            end_BRE = cut_at(near_BR, far_BR, pieces, jitter_BRS)
            with torch.no_grad():
                first, *_ = self.distances(grid_BC, half_B3, places(end_BRE))
            end_BRE = finer_ends(end_BRE, first.view_as(end_BRE), share_BRK, COARSE_SHARPNESS)
            length_BRS, at_BRS = end_BRE.diff(dim=-1), (end_BRE[..., 1:] + end_BRE[..., :-1]) / 2
            distance, slope, inner, features = self.slopes(grid_BC, half_B3, places(at_BRS))
            slope_BRS3 = slope.view(*at_BRS.shape, 3)
            ahead_BRS3 = rays.direction[:, :, None].expand_as(slope_BRS3)
            rest = (part.unflatten(1, at_BRS.shape[1:]) for part in (features, inner))
            given = [slope_BRS3, *rest, ahead_BRS3]
            colour_BRS3 = self.paint(torch.cat(given, dim=-1)).sigmoid()
            distance_BRS = distance.view(at_BRS.shape)
            alpha_BRS = surface_opacity(
                distance_BRS, (slope_BRS3 * ahead_BRS3).sum(dim=-1), length_BRS, self.sharpness()
            )
            weight_BRS = seen_by_opacity(alpha_BRS).weight
            depth_BR = composited(weight_BRS, at_BRS[..., None])[..., 0] / weight_BRS.sum(dim=-1).clamp_min(1e-6)
            colour_BR3 = composited(weight_BRS, colour_BRS3)
            return RayView(colour_BR3, depth_BR, weight_BRS, at_BRS, distance_BRS, slope_BRS3, crosses_BR)
