"""Denoising diffusion: how noise comes in, what a network owes, and one step back.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239, eq. 4 (noising), 14 (loss), and
their linear schedule; Nichol, Dhariwal, 2021, arXiv 2102.09672, eq. 17 (cosine schedule); Song et al., "Denoising
Diffusion Implicit Models", 2020, arXiv 2010.02502, eq. 12 and 16 (the step back); Salimans, Ho, 2022, arXiv 2202.00512,
section 4 (velocity). Clipping as in the code published with Dhariwal, Nichol, 2021, arXiv 2105.05233.
Shapes: T noise levels, B batch. kept (alpha bar) is the share of variance that is still the image, in (0, 1].
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_NOISE = 0.999  # of one step, as in Nichol and Dhariwal: the cosine would reach 1, which no step back survives


def linear_kept(levels: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """kept [T] in float64 when the noise of a step grows evenly from `first` to `last`, both in (0, 1)."""
    return (1 - torch.linspace(first, last, levels, dtype=torch.float64)).cumprod(dim=0)


def cosine_kept(levels: int, offset: float = 0.008) -> Tensor:
    """kept [T] in float64, falling as the square of a cosine; `offset` >= 0 keeps the first steps from being tiny."""
    time = torch.arange(levels + 1, dtype=torch.float64) / levels
    curve = torch.cos((time + offset) / (1 + offset) * math.pi / 2).square()
    return (curve[1:] / curve[:-1]).clamp(min=1 - MOST_NOISE).cumprod(dim=0)


def add_noise(clean: Tensor, noise: Tensor, kept_B: Tensor) -> Tensor:
    """x_t = sqrt(kept) x_0 + sqrt(1 - kept) noise, of the images' shape [B ...]."""
    kept = _beside(kept_B, clean)
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def velocity(clean: Tensor, noise: Tensor, kept_B: Tensor) -> Tensor:
    """v = sqrt(kept) noise - sqrt(1 - kept) x_0, of the images' shape: what x_t moves along as kept falls."""
    kept = _beside(kept_B, clean)
    return kept.sqrt() * noise - (1 - kept).sqrt() * clean


def noise_of_velocity(v: Tensor, noisy: Tensor, kept_B: Tensor) -> Tensor:
    """noise = sqrt(kept) v + sqrt(1 - kept) x_t, of the images' shape."""
    kept = _beside(kept_B, noisy)
    return kept.sqrt() * v + (1 - kept).sqrt() * noisy


def prediction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all entries, in float32 or wider. Images and levels weigh the same."""
    wide = torch.promote_types(predicted.dtype, torch.float32)
    return F.mse_loss(predicted.to(wide), target.to(wide))


def step_back(
    noisy: Tensor,
    predicted: Tensor,
    kept_B: Tensor,
    next_B: Tensor,
    eta: float,
    fresh: Tensor,
    clip: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The image at the level `next`, from its noise at the level `kept` <= `next` as predicted.

    Args:
        eta: share of the noise that is drawn anew, in [0, 1]: 0 is DDIM, whose result is a function of the first noise,
            and 1 the ancestral step of DDPM with its smaller variance.
        fresh: standard normal, of the images' shape.
        clip: least and greatest value of a clean image, broadcast to the images' shape. The clean image that the noise
            implies is clipped to them, and the noise is then what the clipped image implies: the two still add up to
            `noisy`, and at eta = 1 the step is DDPM's for the clipped image (2006.11239, eq. 7).
    """
    kept, following = _beside(kept_B, noisy), _beside(next_B, noisy)
    clean = (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
    if clip is not None:
        least, greatest = (end.to(noisy) for end in clip)
        inside = clean.clamp(least, greatest)
        # As a difference: where nothing is clipped, the noise stays as it is to the last bit.
        predicted = predicted + (kept / (1 - kept)).sqrt() * (clean - inside)
        clean = inside
    renewed = eta**2 * (1 - following) / (1 - kept) * (1 - kept / following)
    return following.sqrt() * clean + (1 - following - renewed).clamp_min(0).sqrt() * predicted + renewed.sqrt() * fresh


def _beside(kept_B: Tensor, image: Tensor) -> Tensor:
    return kept_B.to(image).view(-1, *[1] * (image.ndim - 1))
