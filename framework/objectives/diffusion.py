"""Denoising diffusion: how noise is added, what a network must predict, and one step back.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239, eq. 4 (noising), 14 (loss), and
their linear schedule; Nichol, Dhariwal, 2021, arXiv 2102.09672, eq. 15 and 16 (learned variance) and 17 (cosine
schedule); Song et al., "Denoising Diffusion Implicit Models", 2020, arXiv 2010.02502, eq. 12 and 16 (the step back);
Salimans, Ho, 2022, arXiv 2202.00512, section 4 (velocity); Rombach et al., 2021, arXiv 2112.10752 (the schedule of
latent diffusion, of its code). Clipping as in the code published with Dhariwal, Nichol, 2021, arXiv 2105.05233.
Shapes: T noise levels (the literature's timesteps t), B batch. kept (the literature's alpha_bar, in code
alphas_cumprod) is the share of variance that is still the image, in (0, 1]. Its table must be in float32 or wider: near
1, where half precision has no numbers left, 1 - kept is the noise.
All functions compute in float32 or wider and round once, to the dtype of the images they are given.
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from lightspan.core.devices import wide_type
from lightspan.objectives.means import mean, squared_error

PIXEL = 1 / 255  # half the distance of two 8-bit values in [-1, 1]
MOST_NOISE = 0.999  # of one step, as in Nichol and Dhariwal: the cosine would reach 1, from which there is no step back


def linear_kept(levels: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """kept [T] in float64 if the noise of a step grows evenly from `first` to `last`, both in (0, 1)."""
    return (1 - torch.linspace(first, last, levels, dtype=torch.float64)).cumprod(dim=0)


def scaled_linear_kept(levels: int, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """kept [T] in float64 if the square root of the noise of a step grows evenly: the schedule of Stable Diffusion."""
    return (1 - torch.linspace(first**0.5, last**0.5, levels, dtype=torch.float64).square()).cumprod(dim=0)


def cosine_kept(levels: int, offset: float = 0.008) -> Tensor:
    """kept [T] in float64, falling as the square of a cosine; `offset` >= 0 keeps the first steps from being tiny."""
    time = torch.arange(levels + 1, dtype=torch.float64) / levels
    curve = torch.cos((time + offset) / (1 + offset) * math.pi / 2).square()
    return (curve[1:] / curve[:-1]).clamp(min=1 - MOST_NOISE).cumprod(dim=0)


def add_noise(clean: Tensor, noise: Tensor, kept_B: Tensor) -> Tensor:
    """x_t = sqrt(kept) x_0 + sqrt(1 - kept) noise, of the images' shape [B ...]."""
    image, grain = _amplitudes(kept_B, clean)
    return (image * clean + grain * noise).to(clean.dtype)


def velocity(clean: Tensor, noise: Tensor, kept_B: Tensor) -> Tensor:
    """v = sqrt(kept) noise - sqrt(1 - kept) x_0, of the images' shape: the direction of x_t as kept falls."""
    image, grain = _amplitudes(kept_B, clean)
    return (image * noise - grain * clean).to(clean.dtype)


def noise_of_velocity(v: Tensor, noisy: Tensor, kept_B: Tensor) -> Tensor:
    """noise = sqrt(kept) v + sqrt(1 - kept) x_t, of the images' shape."""
    image, grain = _amplitudes(kept_B, noisy)
    return (image * v + grain * noisy).to(noisy.dtype)


def prediction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all entries, in float32 or wider. Images and levels have equal weight."""
    return squared_error(predicted, target)


def variance_ends(kept_T: Tensor) -> Tensor:
    """Logarithms of the least and the greatest variance that a step back from each level can have, float64 [2 T].

    They are the posterior's, which knows the clean image, and that of the noise that the step removes: beta~ and beta.
    The first level's least, which is 0, is taken from the second, as in the published code.
    """
    kept_T = kept_T.double()
    before_T = torch.cat([kept_T.new_ones(1), kept_T[:-1]])
    greatest_T = 1 - kept_T / before_T
    least_T = greatest_T * (1 - before_T) / (1 - kept_T)
    return torch.stack([torch.cat([least_T[1:2], least_T[1:]]), greatest_T]).log()


def log_variance(share: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Of the step back: between its ends, at (share + 1) / 2 of the way (2102.09672, eq. 15).

    Args:
        share: as the network says; from -1, the least, to 1, and unbounded.
    """
    return least + (share + 1) / 2 * (greatest - least)


def variance_loss(
    predicted: Tensor, share: Tensor, noise: Tensor, clean: Tensor, kept_B: Tensor, ends_2B: Tensor, last_B: Tensor
) -> Tensor:
    """Bits per entry by which a step back with this mean and variance misses the true one: the term of its level in the
    variational bound, whose mean over levels is L_vlb / T. Only the variance gets a gradient, as in eq. 16. The mean is
    over all ranks.

    Args:
        predicted, noise: as predicted, and as it was.
        share: what `log_variance` makes a variance of.
        clean: images in [-1, 1] of 8 bits; values beyond count as these ends, as DiT's code has it for latents.
        ends_2B: `variance_ends` of the levels.
        last_B: whether the step leaves no noise. It is then judged by the probability of the clean image's 8-bit
            values, and any other by its divergence (KL) from the posterior.
    """
    kept, left = _shares(kept_B, noise)
    least, greatest, last = (each.view(kept.shape) for each in (*ends_2B.to(kept), last_B.to(kept.device)))
    variance = log_variance(share.to(kept.dtype), least, greatest)
    # The posterior's mean is beta / sqrt(alpha (1 - kept)) times the noise off x_t / sqrt(alpha): 2006.11239, eq. 11.
    weight = greatest.exp() / (-torch.expm1(greatest) * left).sqrt()
    away = weight * (noise - predicted.detach().to(kept.dtype))
    divergence = (variance - least + (least - variance).exp() - 1 + away.square() * (-variance).exp()) / 2
    # Of the last step alone: elsewhere it may be infinite, whose gradient times 0 is NaN.
    surprise = -log_pixel_probability(clean.to(kept.dtype), away, torch.where(last, variance, least))
    return mean(torch.where(last, surprise, divergence)) / math.log(2)


def log_pixel_probability(clean: Tensor, away: Tensor, variance: Tensor) -> Tensor:
    """Of the 8-bit values of an image in [-1, 1], where a Gaussian with this logarithm of its variance has its mean at
    clean + away: of the interval around each value, which is open at either end.
    """
    scale = (-variance / 2).exp()
    # In the tail, where differences of probabilities keep their digits.
    near, far = (log_ndtr((side - away.abs()) * scale) for side in (PIXEL, -PIXEL))
    inside = near + (-torch.expm1(far - near)).clamp_min(torch.finfo(near.dtype).tiny).log()
    lowest, highest = (log_ndtr((PIXEL + sign * away) * scale) for sign in (-1, 1))
    return torch.where(clean < -0.999, lowest, torch.where(clean > 0.999, highest, inside))


def step_back(
    noisy: Tensor,
    predicted: Tensor,
    kept_B: Tensor,
    next_B: Tensor,
    eta: float,
    fresh: Tensor,
    clip: tuple[Tensor, Tensor] | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """The image at the level `next`, from its noise at the level `kept` <= `next` as predicted: a DDIM step.

    Args:
        eta: share of the noise that is drawn afresh, in [0, 1]: 0 is DDIM, whose result is a function of the first
            noise, and 1 the ancestral step of DDPM with its smaller variance.
        fresh: standard normal, of the images' shape.
        clip: least and greatest value of a clean image, broadcast to the images' shape. The clean image that the noise
            implies is clipped to them, and the noise is then what the clipped image implies: the two still add up to
            `noisy`, and at eta = 1 the step is DDPM's for the clipped image (2006.11239, eq. 7).
        share: of a learned variance, of the images' shape; at eta = 1 it is that of `log_variance`. None is -1.
    """
    dtype, (kept, left), (following, next_left) = noisy.dtype, _shares(kept_B, noisy), _shares(next_B, noisy)
    divisor = left.clamp_min(torch.finfo(left.dtype).tiny)  # even a level without noise has a step back
    clean = (noisy - left.sqrt() * predicted) / kept.sqrt()
    if clip is not None:
        least, greatest = (end.to(clean) for end in clip)
        inside = clean.clamp(least, greatest)
        # As a difference: where nothing is clipped, the noise does not change by a bit.
        predicted = predicted + (kept / divisor).sqrt() * (clean - inside)
        clean = inside
    renewed = eta**2 * next_left / divisor * (1 - kept / following)
    if share is not None:  # beta / beta~ is left / next_left; a step that leaves no noise draws none
        fresh = fresh * torch.where(next_left > 0, left / next_left, 1) ** ((share.to(left.dtype) + 1) / 4)
    grain = (next_left - renewed).clamp_min(0).sqrt() * predicted + renewed.sqrt() * fresh
    return (following.sqrt() * clean + grain).to(dtype)


def _shares(kept_B: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """kept and 1 - kept, the share of the noise, in float32 or wider, shaped to broadcast to images [B ...]."""
    wide = wide_type(kept_B.dtype, image.dtype)
    kept = kept_B.to(image.device, wide).view(-1, *[1] * (image.ndim - 1))
    return kept, 1 - kept


def _amplitudes(kept_B: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(kept) of the image and sqrt(1 - kept) of the noise."""
    kept, left = _shares(kept_B, image)
    return kept.sqrt(), left.sqrt()
