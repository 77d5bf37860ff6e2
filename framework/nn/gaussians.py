"""Gaussians in space and what cameras see of them, by splatting, in plain PyTorch.

Source: Kerbl et al., "3D Gaussian Splatting", 2023, arXiv 2308.04079, sections 4 and 6; the projection is that of
Zwicker et al., "EWA Splatting", 2002. A Gaussian of centre mu and covariance R S S^T R^T, with R of its quaternion and
S of its three scales, lies at t = W (mu - place) before a camera of rotation W, and in its picture at p, whose
derivative by t is J. There its covariance is Sigma' = (J W R S) (J W R S)^T + 0.3 I in pixels^2, and at a distance d of
p its opacity is alpha = min(0.99, o exp(-d^T Sigma'^-1 d / 2)), or 0 where that is below 1/255. From the nearest to the
farthest they are composited by `lightspan.nn.rendering`, and what passes them all shows the background.
Not here: colours that depend on directions, tiles, and that authors stop at a pixel once less than 1e-4 of its light is
left, which changes it by no more than that.
Shapes: B pictures, G Gaussians of each, C channels, H W pixels, P of them at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightspan.core.devices import wide
from lightspan.nn.rendering import composited, seen_by_opacity

BLUR = 0.3
"""Added to the variances of a Gaussian in a picture, in pixels^2: none is thinner than a pixel."""
MOST_OPAQUE, LEAST_OPAQUE = 0.99, 1 / 255
MOST_PAIRS = 2**26
"""Pixels times Gaussians that are held at once, 256 MB a tensor; of more pictures each part is computed again for the
gradient.
"""


class Gaussians(NamedTuple):
    """centre_BG3: mu. scale_BG3: standard deviations along a Gaussian's own axes, >= 0, in the unit of mu.
    turn_BG4: quaternions, real part first, of any length; 0 turns nothing. opacity_BG: o, in [0, 1]. colour_BGC.
    """

    centre_BG3: Tensor
    scale_BG3: Tensor
    turn_BG4: Tensor
    opacity_BG: Tensor
    colour_BGC: Tensor


class GaussianCameras(NamedTuple):
    """place_B3, rotation_B33, intrinsics_B33: as in `lightspan.nn.rendering.rays_through`."""

    place_B3: Tensor
    rotation_B33: Tensor
    intrinsics_B33: Tensor


class Splats(NamedTuple):
    """Gaussians in a picture, the nearest first.

    at_BG2: x and y, in pixels. axes_BG23: A, of which A A^T is the covariance before it is blurred. opacity_BG: 0 of
    what is not seen. colour_BGC.
    """

    at_BG2: Tensor
    axes_BG23: Tensor
    opacity_BG: Tensor
    colour_BGC: Tensor


class GaussianPictures(NamedTuple):
    """colour_BCHW. passes_BHW: the share of light that passes all Gaussians, in [0, 1]."""

    colour_BCHW: Tensor
    passes_BHW: Tensor


def turns(quaternion: Tensor) -> Tensor:
    """Rotations [... 3 3] of quaternions [... 4], real part first, of any length and sign; of 0 the identity."""
    w, x, y, z = F.normalize(wide(quaternion), dim=-1).unbind(dim=-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def sound(cameras: GaussianCameras) -> Tensor:
    """Which cameras can see, bool [B]: those of finite numbers with a rotation and a lens that can be inverted."""
    finite_B = torch.stack([part.flatten(1).isfinite().all(dim=1) for part in cameras]).all(dim=0)
    flat_B = (_determinant(cameras.rotation_B33) == 0) | (_determinant(cameras.intrinsics_B33) == 0)
    return finite_B & ~flat_B


def splatted(gaussians: Gaussians, cameras: GaussianCameras, near: float = 0.2) -> Splats:
    """Gaussians as cameras see them, in float32 or wider and with gradients to all of them.

    Those that are less than `near` ahead are not seen, nor is anything by a camera that is not `sound`: their gradients
    are 0.

    Args:
        near: above 0, in the unit of the centres.
    """
    with torch.autocast(gaussians.centre_BG3.device.type, enabled=False):
        centre_BG3, scale_BG3, _, opacity_BG, colour_BGC = (wide(part) for part in gaussians)
        sound_B = sound(cameras)
        eye_33 = torch.eye(3, device=centre_BG3.device, dtype=centre_BG3.dtype)
        # What cannot see is replaced: its gradients would be 0 times infinity.
        place_B3 = wide(cameras.place_B3).where(sound_B[:, None], 0)
        rotation_B33, lens_B33 = (
            wide(part).where(sound_B[:, None, None], eye_33) for part in (cameras.rotation_B33, cameras.intrinsics_B33)
        )
        own_BG3 = _applied(rotation_B33, centre_BG3 - place_B3[:, None])
        ahead_BG = (own_BG3[..., 2] >= near) & (_applied(lens_B33, own_BG3)[..., 2] > 0)
        seen_BG = ahead_BG & sound_B[:, None]
        own_BG3 = own_BG3.where(seen_BG[..., None], eye_33[2])
        x_BG, y_BG, far_BG = _applied(lens_B33, own_BG3).unbind(dim=-1)
        at_BG2 = torch.stack([x_BG, y_BG], dim=-1) / far_BG[..., None]
        # Of p = (K t)_12 / (K t)_3, row by row.
        slope_BG23 = lens_B33[:, None, :2] - at_BG2[..., None] * lens_B33[:, None, 2:]
        slope_BG23 = slope_BG23 / far_BG[..., None, None]
        axes_BG23 = slope_BG23 @ rotation_B33[:, None] @ turns(gaussians.turn_BG4) * scale_BG3[..., None, :]
        found = Splats(at_BG2, axes_BG23, opacity_BG.where(seen_BG, 0), colour_BGC)
        order_BG = own_BG3[..., 2].detach().masked_fill(~seen_BG, torch.inf).argsort(dim=1, stable=True)
        row_B1 = torch.arange(len(order_BG), device=order_BG.device)[:, None]
        return Splats(*(part[row_B1, order_BG] for part in found))


def splat_opacity(splats: Splats, pixel_P2: Tensor) -> Tensor:
    """alpha of each splat at places of a picture, [B P G], in [0, 0.99].

    Args:
        pixel_P2: x and y; a pixel's middle lies at whole numbers.
    """
    first_BG3, second_BG3 = splats.axes_BG23.unbind(dim=2)
    xx_BG, yy_BG = (axis.square().sum(dim=2) + BLUR for axis in (first_BG3, second_BG3))
    xy_BG = (first_BG3 * second_BG3).sum(dim=2)
    # The determinant of A A^T + 0.3 I as a sum of squares: xx yy - xy^2 would lose its sign to rounding.
    across_BG3 = torch.linalg.cross(first_BG3, second_BG3)
    determinant_BG = across_BG3.square().sum(dim=2) + BLUR * (xx_BG + yy_BG - BLUR)
    dx_BPG, dy_BPG = (pixel_P2[:, axis, None] - splats.at_BG2[:, None, :, axis] for axis in range(2))
    weighted = (yy_BG, -2 * xy_BG, xx_BG)
    xx_B1G, xy_B1G, yy_B1G = ((part / determinant_BG)[:, None] for part in weighted)
    apart_BPG = xx_B1G * dx_BPG.square() + xy_B1G * dx_BPG * dy_BPG + yy_B1G * dy_BPG.square()
    alpha_BPG = (splats.opacity_BG[:, None] * torch.exp(-apart_BPG.clamp_min(0) / 2)).clamp_max(MOST_OPAQUE)
    return alpha_BPG.where(alpha_BPG >= LEAST_OPAQUE, 0)


def drawn(
    gaussians: Gaussians,
    cameras: GaussianCameras,
    height: int,
    width: int,
    near: float = 0.2,
    background_C: Tensor | None = None,
) -> GaussianPictures:
    """Pictures of Gaussians, each of its own.

    Args:
        near: see `splatted`.
        background_C: what is seen where nothing is; None is 0.
    """
    splats = splatted(gaussians, cameras, near)
    like = splats.at_BG2
    steps = (torch.arange(side, device=like.device, dtype=like.dtype) for side in (width, height))
    pixel_P2 = torch.cartesian_prod(*steps).view(width, height, 2).transpose(0, 1).flatten(0, 1)
    most = max(1, MOST_PAIRS // max(1, like[..., 0].numel()))
    parts = pixel_P2.split(most)
    if len(parts) == 1:
        shown = [_shown(splats, pixel_P2)]
    else:
        shown = [checkpoint(_shown, splats, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    colour_BPC, passes_BP = (torch.cat(part, dim=1) for part in zip(*shown, strict=True))
    if background_C is not None:
        colour_BPC = colour_BPC + passes_BP[..., None] * background_C
    return GaussianPictures(
        colour_BPC.transpose(1, 2).unflatten(2, (height, width)), passes_BP.unflatten(1, (height, width))
    )


def _shown(splats: Splats, pixel_P2: Tensor) -> tuple[Tensor, Tensor]:
    """Colours [B P C] and what passes [B P]."""
    weight_BPG, passes_BP = seen_by_opacity(splat_opacity(splats, pixel_P2))
    return composited(weight_BPG, splats.colour_BGC[:, None]), passes_BP


def _applied(matrix_B33: Tensor, x_BG3: Tensor) -> Tensor:
    return x_BG3 @ matrix_B33.transpose(1, 2)


def _determinant(matrix_B33: Tensor) -> Tensor:
    """[B], without a decomposition, which half types lack."""
    first, second, third = wide(matrix_B33).unbind(dim=1)
    return (torch.linalg.cross(first, second) * third).sum(dim=1)
