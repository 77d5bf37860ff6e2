"""Volume rendering: how much of each sample along a ray is seen, what the ray shows, and where its samples lie.

Source: Mildenhall et al., "NeRF", ECCV 2020, arXiv 2003.08934, eq. 3, after Max, 1995. Of samples 1 ... S from the eye
on, with density sigma and length delta,
alpha_i = 1 - exp(-sigma_i delta_i), T_i = product over j < i of (1 - alpha_j), w_i = T_i alpha_i, C = sum of w_i c_i.
T after the last sample is the share of light that passes all of them; it and the weights sum to 1.
Surfaces of a signed distance, and finer samples around them: Wang et al., "NeuS", 2021, arXiv 2106.10689, eq. 13 and
section 3.2.
Samples stand in rows, [R S], or one after the other, [N] with `offsets` [R + 1] at which rays begin and end.
Shapes: R rays (dense ones may have any axes), S samples of each, N of all, C channels, B cameras, H W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide


class RayWeights(NamedTuple):
    """weight: of each sample, as the samples stand, in [0, 1]. passes: the share of light that passes all samples of a
    ray, [R], in [0, 1].
    """

    weight: Tensor
    passes: Tensor


def opacity(density: Tensor, length: Tensor) -> Tensor:
    """1 - exp(-density length), in float32 or wider and in [0, 1), to full precision also near 0.

    Args:
        density: per unit of length, >= 0.
        length: >= 0.
    """
    return -torch.expm1(-wide(density) * wide(length))


def surface_opacity(distance: Tensor, slope: Tensor, length: Tensor, sharpness: Tensor | float) -> Tensor:
    """Of pieces of rays in a signed distance, in float32 or wider and in [0, 1]: with Phi the sigmoid, and the
    distances s at a piece's ends by its middle and slope, (Phi(k s_begin) - Phi(k s_end)) / Phi(k s_begin), which sees
    a surface where the distance is 0. Where a ray goes away from a body nothing is seen; deep inside all is opaque.

    Args:
        distance: in the middle of each piece, any shape.
        slope: its derivative along the ray; above 0 it counts as 0.
        length: of each piece, >= 0.
        sharpness: k, above 0; the larger, the thinner is what is seen of a surface.
    """
    half = wide(slope).clamp_max(0) * wide(length) / 2
    begin, end = ((sharpness * (wide(distance) + side * half)).sigmoid() for side in (-1, 1))
    # The authors' constant, for where both are 0: deep inside the quotient is 1.
    return ((begin - end + 1e-5) / (begin + 1e-5)).clamp(0, 1)


def seen_by_density(density: Tensor, length: Tensor, offsets: Tensor | None = None) -> RayWeights:
    """Weights of samples with a density, in float32 or wider.

    Args:
        density: per unit of length, >= 0, [... S]; or [N].
        length: of each sample along its ray, >= 0, of the same shape.
        offsets: int64 [R + 1], from 0 to N, ascending, of samples that stand one after the other; a ray may have none.
    """
    depth = wide(density) * wide(length)
    if offsets is not None:
        depth = in_rows(depth, offsets)
    # Of what lies before each sample, and behind the last one. Products of many numbers near 1 would lose digits.
    clear = torch.exp(-F.pad(depth.cumsum(dim=-1), (1, 0)))
    weight = clear[..., :-1] * -torch.expm1(-depth)
    return RayWeights(weight if offsets is None else in_line(weight, offsets), clear[..., -1])


def seen_by_opacity(alpha: Tensor, offsets: Tensor | None = None) -> RayWeights:
    """Weights of samples with an opacity, as those of Gaussians or of a signed distance, in float32 or wider.

    Args:
        alpha: in [0, 1], [... S]; or [N].
        offsets: as in `seen_by_density`.
    """
    alpha = wide(alpha)
    if offsets is not None:
        alpha = in_rows(alpha, offsets)
    clear = F.pad((1 - alpha).cumprod(dim=-1), (1, 0), value=1.0)
    weight = clear[..., :-1] * alpha
    return RayWeights(weight if offsets is None else in_line(weight, offsets), clear[..., -1])


def composited(weight: Tensor, value: Tensor, offsets: Tensor | None = None) -> Tensor:
    """What rays show, the sum of weight times value over their samples: [... C] of values [... S C], or [R C] of [N C].

    The depth of a ray is this of the places of its samples, over the sum of the weights.
    """
    shown = weight[..., None] * wide(value)
    return shown.sum(dim=-2) if offsets is None else in_rows(shown, offsets).sum(dim=1)


def in_rows(line: Tensor, offsets: Tensor) -> Tensor:
    """Samples that stand one after the other, [N ...], as a row for each ray, [R S ...], filled up with 0. S is the
    longest ray's, for which the device is asked.
    """
    count_R = offsets.diff()
    longest = int(count_R.max()) if len(count_R) else 0
    row = torch.repeat_interleave(torch.arange(len(count_R), device=line.device), count_R, output_size=len(line))
    place = torch.arange(len(line), device=line.device) - offsets[row]
    return line.new_zeros(len(count_R), longest, *line.shape[1:]).index_put((row, place), line)


def in_line(rows: Tensor, offsets: Tensor) -> Tensor:
    """The inverse of `in_rows`: [R S ...] -> [N ...]."""
    count_R = offsets.diff()
    return rows[torch.arange(rows.shape[1], device=rows.device) < count_R[:, None]]


class Rays(NamedTuple):
    """origin, direction: [... 3]; directions are of length 1."""

    origin: Tensor
    direction: Tensor


def camera_rays(place_B3: Tensor, rotation_B33: Tensor, intrinsics_B33: Tensor, height: int, width: int) -> Rays:
    """Through the middles of all pixels, [B H W 3] each: `rays_through` them."""
    y_HW, x_HW = torch.meshgrid(
        torch.arange(height, dtype=place_B3.dtype, device=place_B3.device),
        torch.arange(width, dtype=place_B3.dtype, device=place_B3.device),
        indexing="ij",
    )
    pixel_N2 = torch.stack([x_HW, y_HW], dim=-1).flatten(0, 1)
    rays = rays_through(place_B3, rotation_B33, intrinsics_B33, pixel_N2.expand(len(place_B3), -1, -1))
    return Rays(*(part.unflatten(1, (height, width)) for part in rays))


def rays_through(place_B3: Tensor, rotation_B33: Tensor, intrinsics_B33: Tensor, pixel_BN2: Tensor) -> Rays:
    """Through places of pictures, [B N 3] each.

    Args:
        place_B3: of the cameras.
        rotation_B33: whose rows are a camera's axes: to the right, down and ahead in its picture. A point X lies at
            rotation (X - place) as the camera sees it.
        intrinsics_B33: in pixels, upper triangular; a pixel's middle lies at whole numbers.
        pixel_BN2: x and y.
    """
    pixel_BN3 = torch.cat([pixel_BN2, torch.ones_like(pixel_BN2[..., :1])], dim=-1)
    # Without a check, which would wait for the device: of a lens that is none nothing is finite.
    own_B33 = torch.linalg.inv_ex(intrinsics_B33).inverse
    direction_BN3 = torch.einsum("bji,bjk,bnk->bni", rotation_B33, own_B33, pixel_BN3)
    direction_BN3 = direction_BN3 / direction_BN3.norm(dim=-1, keepdim=True)
    return Rays(place_B3[:, None].expand_as(direction_BN3), direction_BN3)


def crossing(rays: Rays, low_3: Tensor, high_3: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave a box, [...] each, as lengths from their origin, >= 0; both are the same where a ray
    misses it. A ray that starts inside enters at 0.

    Args:
        low_3, high_3: corners of the box, low < high along each axis.
    """
    tiny = torch.finfo(rays.direction.dtype).tiny
    # A ray along a side has always been between it and the opposite one, or never is.
    way = torch.where(rays.direction.abs() < tiny, tiny, rays.direction)
    first, second = (low_3 - rays.origin) / way, (high_3 - rays.origin) / way
    near = torch.minimum(first, second).amax(dim=-1).clamp_min(0)
    far = torch.maximum(first, second).amin(dim=-1)
    return near, torch.maximum(near, far)


def along(near_R: Tensor, far_R: Tensor, samples: int, jitter_RS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places of samples and their lengths, [R S] each: a ray from `near` to `far` is cut into equal pieces, which have
    a sample each.

    Args:
        jitter_RS: where in its piece a sample lies, in [0, 1]; None is the middle.
    """
    piece_R1 = ((far_R - near_R) / samples)[..., None]
    share = 0.5 if jitter_RS is None else jitter_RS
    at_RS = near_R[..., None] + piece_R1 * (torch.arange(samples, device=near_R.device, dtype=near_R.dtype) + share)
    return at_RS, piece_R1.expand_as(at_RS)


def cut_at(near_R: Tensor, far_R: Tensor, pieces: int, jitter_RS: Tensor | None = None) -> Tensor:
    """Ends of the pieces of rays from `near` to `far`, ascending, [R S + 1].

    Args:
        jitter_RS: where each end but the first and the last lies, in [0, 1), within half a piece of its place, of which
            S - 1 are read; None cuts equal pieces.
    """
    steps_E = torch.arange(pieces + 1, device=near_R.device, dtype=near_R.dtype)
    at_RE = steps_E.expand(*near_R.shape, pieces + 1)
    if jitter_RS is not None:
        at_RE = at_RE + F.pad(jitter_RS[..., : pieces - 1] - 0.5, (1, 1))
    return near_R[..., None] + (far_R - near_R)[..., None] * at_RE / pieces


def finer_ends(end_RE: Tensor, distance_RE: Tensor, share_RK: Tensor, sharpness: float) -> Tensor:
    """The ends of pieces and K more where a signed distance shows a surface, ascending, [R E + K], without gradients:
    NeuS's step of importance sampling. A piece has the steeper slope of its own and that of the piece before it, as in
    the authors' code.

    Args:
        distance_RE: at the ends.
        share_RK: which quantiles of what is seen the new ends are, in [0, 1].
        sharpness: see `surface_opacity`.
    """
    with torch.no_grad():
        length_RS, middle_RS = end_RE.diff(dim=-1), (distance_RE[..., 1:] + distance_RE[..., :-1]) / 2
        slope_RS = distance_RE.diff(dim=-1) / (length_RS + 1e-5)
        slope_RS = torch.minimum(slope_RS, F.pad(slope_RS[..., :-1], (1, 0))).clamp(-1e3, 0)
        weight_RS = seen_by_opacity(surface_opacity(middle_RS, slope_RS, length_RS, sharpness)).weight + 1e-5
        sum_RE = F.pad(weight_RS.cumsum(dim=-1), (1, 0))
        sum_RE = sum_RE / sum_RE[..., -1:]
        right_RK = torch.searchsorted(sum_RE.contiguous(), share_RK.to(sum_RE.dtype).contiguous(), right=True)
        right_RK = right_RK.clamp(1, end_RE.shape[-1] - 1)
        low_RK, high_RK = sum_RE.gather(-1, right_RK - 1), sum_RE.gather(-1, right_RK)
        within_RK = ((share_RK - low_RK) / (high_RK - low_RK).clamp_min(1e-12)).clamp(0, 1)
        first_RK, last_RK = end_RE.gather(-1, right_RK - 1), end_RE.gather(-1, right_RK)
        return torch.cat([end_RE, (first_RK + within_RK * (last_RK - first_RK)).to(end_RE.dtype)], dim=-1).sort().values
