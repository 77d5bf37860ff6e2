"""Diffusion over any levels of noise (EDM): how a network is scaled at each, what it must predict, and its sampler.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv
2206.00364, table 1 and equations 3, 5, 7 and 8. A noisy image is x = clean + sigma noise, and with s the standard
deviation of clean images, the denoiser around a network F is
D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), where
c_skip = s^2 / (sigma^2 + s^2), c_out = -sigma s / sqrt(sigma^2 + s^2), c_in = 1 / sqrt(sigma^2 + s^2),
c_noise = ln(sigma) / 4.
The sign of c_out is that of Stable Video Diffusion (arXiv 2311.15127, appendix D), whose F is a velocity; in the paper,
whose F is its negative, it is positive.
Shapes: B batch; images have any axes behind it. All functions compute in float32 or wider, and round once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightspan.core.devices import wide_type
from lightspan.core.ranges import require_in
from lightspan.objectives.means import squared_error


class LevelScales(NamedTuple):
    """c_skip, c_out and c_in, shaped to broadcast to images [B ...], and c_noise [B]."""

    skip: Tensor
    out: Tensor
    into: Tensor
    level_B: Tensor


def scales(sigma_B: Tensor, image: Tensor, std: float = 1.0) -> LevelScales:
    """Of levels sigma_B > 0, for images like `image`, in float32 or wider.

    Args:
        std: s, of clean images, above 0.
    """
    sigma = _shaped(sigma_B, image)
    total = (sigma.square() + std**2).sqrt()
    return LevelScales((std / total).square(), -sigma * std / total, 1 / total, sigma.flatten().log() / 4)


def with_noise(clean: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """x = clean + sigma noise, of the images' shape [B ...]."""
    return (clean + _shaped(sigma_B, clean) * noise).to(clean.dtype)


def denoised(output: Tensor, noisy: Tensor, sigma_B: Tensor, std: float = 1.0) -> Tensor:
    """D, of the network's output F, both [B ...] (eq. 7)."""
    scale = scales(sigma_B, noisy, std)
    return (scale.skip * noisy + scale.out * output).to(noisy.dtype)


def target(clean: Tensor, noise: Tensor, sigma_B: Tensor, std: float = 1.0) -> Tensor:
    """What F is where D is the clean image: (s^2 noise - sigma clean) / (s sqrt(sigma^2 + s^2)), of the images' shape.

    In this form no digits are lost at small levels, where c_out is near 0.
    """
    sigma = _shaped(sigma_B, clean)
    return ((std**2 * noise - sigma * clean) / (std * (sigma.square() + std**2).sqrt())).to(clean.dtype)


def level_weight(sigma_B: Tensor, std: float = 1.0) -> Tensor:
    """(sigma^2 + s^2) / (sigma s)^2 = 1 / c_out^2, [B]: so weighted, the squared error of D is that of F (eq. 8)."""
    return (sigma_B.square() + std**2) / (sigma_B * std).square()


def denoising_loss(output: Tensor, clean: Tensor, noise: Tensor, sigma_B: Tensor, std: float = 1.0) -> Tensor:
    """The mean of `level_weight` (D - clean)^2 over all entries and ranks, a scalar in float32 or wider; 0, with
    gradient 0, without any. Computed as the mean of (F - target)^2, which is the same.
    """
    return squared_error(output, target(clean, noise, sigma_B, std))


def falling_sigmas(steps: int, least: float, most: float, bend: float = 7.0) -> Tensor:
    """The levels at which a sampler stops, float64 [steps + 1], from `most` to `least`, and 0 (eq. 5).

    Args:
        steps: at least 1; a single one begins at `most`.
        bend: rho: how much nearer to one another they are at the end, at least 1.
    Raises: UserError for numbers outside of these, or least above most.
    """
    require_in("[1, inf)", steps=steps, bend=bend)
    require_in("(0, inf)", most=most)
    require_in(f"(0, {most}]", least=least)
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = most ** (1 / bend), least ** (1 / bend)
    falling = (ends[0] + share * (ends[1] - ends[0])).pow(bend)
    falling[-1], falling[0] = least, most  # a power of a root rounds
    return torch.cat([falling, falling.new_zeros(1)])


def euler_step(noisy: Tensor, clean: Tensor, sigma: float, following: float) -> Tensor:
    """The images at the level `following`, from D at the level `sigma` > 0: a step along dx / dsigma = (x - D) / sigma
    (eq. 3). At 0 it is D itself.
    """
    kept = following / sigma
    return (kept * noisy + (1 - kept) * clean).to(noisy.dtype)


def _shaped(sigma_B: Tensor, image: Tensor) -> Tensor:
    """In float32 or wider, shaped to broadcast to images [B ...]."""
    wide = wide_type(sigma_B.dtype, image.dtype)
    return sigma_B.to(image.device, wide).view(-1, *[1] * (image.ndim - 1))
