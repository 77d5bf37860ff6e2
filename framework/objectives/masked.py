"""Losses of masked modelling: pixels of hidden patches, and features of hidden patches.

Shapes: B images, M hidden patches of each, d numbers of a patch, D width of features.
"""

from torch import Tensor
from torch.nn import functional as F

from lightspan.devices import wide
from lightspan.distributed import all_reduce_sums
from lightspan.objectives.means import squared_error

LEAST_VARIANCE = 1e-6
"""Added to the variance of a patch, as in MAE's code: a patch of one colour becomes zeros."""


def normalised_patches(patches_BMd: Tensor) -> Tensor:
    """(t - mean) / sqrt(variance + 1e-6) of each patch by itself, in float32 or wider.

    Source: He et al., "MAE", 2021, arXiv 2111.06377, section 3, "Reconstruction target"; the variance is unbiased, as
    in the authors' code. A patch of one number is 0.
    """
    mean_BM1, deviation_BM1 = _moments(patches_BMd)
    return (wide(patches_BMd) - mean_BM1) / deviation_BM1


def denormalised_patches(guess_BMd: Tensor, patches_BMd: Tensor) -> Tensor:
    """The inverse of `normalised_patches`: guesses with the mean and deviation of the patches that they are guesses of.

    A guess of a normalised patch says nothing of its brightness and contrast.
    """
    mean_BM1, deviation_BM1 = _moments(patches_BMd)
    return wide(guess_BMd) * deviation_BM1 + mean_BM1


def _moments(patches_BMd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch, [B M 1]."""
    patches_BMd = wide(patches_BMd)
    mean_BM1 = patches_BMd.mean(dim=2, keepdim=True)
    squares_BM1 = (patches_BMd - mean_BM1).square().sum(dim=2, keepdim=True)
    return mean_BM1, (squares_BM1 / max(patches_BMd.shape[2] - 1, 1) + LEAST_VARIANCE).sqrt()


def patch_regression(guess_BMd: Tensor, patches_BMd: Tensor, normalise: bool = True) -> Tensor:
    """Mean squared error over all numbers of hidden patches, a scalar in float32 or wider; 0 without any.

    Args:
        patches_BMd: what the patches show.
        normalise: compare with `normalised_patches`.
    """
    return squared_error(guess_BMd, normalised_patches(patches_BMd) if normalise else patches_BMd)


def hidden_absolute_error(guess: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean of |guess - target| over the hidden numbers of all ranks, a scalar in float32 or wider; 0 without any.

    Source: Atito et al., "SiT", 2021, arXiv 2104.03602: each hidden number weighs the same, whatever share of its image
    is hidden.

    Args:
        hidden: bool, of a shape that expands to that of `guess` and `target`.
    """
    hidden = hidden.expand_as(target)
    error = (wide(guess) - wide(target)).abs().where(hidden, 0).sum()
    total, count = all_reduce_sums(error, hidden.sum().to(error.dtype))
    return total / count.clamp_min(1)


def feature_regression(guess_BMD: Tensor, features_BMD: Tensor) -> Tensor:
    """Smooth L1 distance of guesses to features that are standardised one by one (a layer norm without weights), mean
    over all numbers, a scalar in float32 or wider; 0 without any.

    Source: the authors' code of I-JEPA (Assran et al., 2023, arXiv 2301.08243); the paper's eq. 1 has the squared
    distance.

    Args:
        features_BMD: of a teacher; no gradient goes into them.
    """
    target_BMD = F.layer_norm(wide(features_BMD.detach()), features_BMD.shape[-1:])
    return F.smooth_l1_loss(wide(guess_BMD), target_BMD, reduction="mean" if guess_BMD.numel() else "sum")
