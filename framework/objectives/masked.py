"""Losses of masked modelling: pixels of hidden patches, and features of hidden patches.

Shapes: B images, M hidden patches of each, d numbers of a patch, D width of features, G groups of bands with L tokens
each, n numbers of a patch of a group or modality.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums
from lightspan.objectives.means import known_mean, mean, mean_of, squared_error

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
    """Mean squared error over all numbers of hidden patches of all ranks, a scalar in float32 or wider; 0 without any.

    Args:
        patches_BMd: what the patches show.
        normalise: compare with `normalised_patches`.
    """
    return squared_error(guess_BMd, normalised_patches(patches_BMd) if normalise else patches_BMd)


def seen_patch_regression(guess_BMd: Tensor, patches_BMd: Tensor, valid_BMd: Tensor) -> Tensor:
    """Squared error over the valid numbers of hidden patches, divided by how many numbers there are, valid or not: a
    scalar in float32 or wider, 0 without any.

    A number that is not valid adds nothing and may hold anything. As the divisor does not depend on what is valid, each
    valid number weighs the same, in whatever micro-batch and on whatever rank it is. Where all are valid it is
    `patch_regression` without normalised targets.

    Source: the loss of Prithvi (Jakubik et al., 2023, arXiv 2310.18660); what is not valid is this project's.

    Args:
        valid_BMd: bool.
    """
    return squared_error(guess_BMd.where(valid_BMd, 0), patches_BMd.where(valid_BMd, 0))


def seen_absolute_error(guess: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """As `seen_patch_regression`, of |guess - target|, in any shape."""
    error = (wide(guess) - wide(target).where(valid, 0)).abs().where(valid, 0)
    return mean(error)


def seen_group_regression(
    guesses: Sequence[Tensor], targets: Sequence[Tensor], valid: Sequence[Tensor], hidden_BGL: Tensor
) -> Tensor:
    """Mean over the hidden tokens of all ranks of their mean squared error, of tokens of several groups with patches of
    their own size; numbers that are not valid add nothing, as in `seen_patch_regression`. 0 where nothing is hidden.

    Source: Cong et al., "SatMAE", 2022, arXiv 2207.08051, and the code of SatMAE++ (arXiv 2403.05419).

    Args:
        guesses, targets, valid: of each group [B L n].
        hidden_BGL: bool; the divisor is the number of these tokens.
    """
    parts = zip(guesses, targets, valid, strict=True)
    errors = [(wide(guess) - wide(target)).where(seen, 0).square().mean(dim=2) for guess, target, seen in parts]
    error_BGL = torch.stack(errors, dim=1)
    return known_mean(error_BGL, hidden_BGL)


def regression_by_modality(
    guess_BHn: Tensor, patches_BHn: Tensor, modality_BH: Tensor, known_BH: Tensor, modalities: int
) -> Tensor:
    """Mean squared error of each modality, over all numbers of its known patches on all ranks: [modalities] in float32
    or wider, 0 for one without any. Their sum weighs modalities alike, however many patches of each are hidden.

    Source: "BM-MAE", 2025, arXiv 2505.00568, and its code.

    Args:
        guess_BHn, patches_BHn: of hidden patches, H for each sample.
        modality_BH: int64, to which modality a patch belongs.
        known_BH: bool; others may hold anything.
    """
    error_BH = (wide(guess_BHn) - wide(patches_BHn)).where(known_BH[:, :, None], 0).square().mean(dim=2)
    own_MBH = (modality_BH == torch.arange(modalities, device=error_BH.device)[:, None, None]) & known_BH
    total_M, count_M = all_reduce_sums(error_BH.where(own_MBH, 0).sum(dim=(1, 2)), own_MBH.sum(dim=(1, 2)).to(error_BH))
    return total_M / count_M.clamp_min(1)


def hidden_absolute_error(guess: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean of |guess - target| over the hidden numbers of all ranks, a scalar in float32 or wider; 0 without any.

    Source: Atito et al., "SiT", 2021, arXiv 2104.03602: each hidden number weighs the same, whatever share of its image
    is hidden. It is the loss of TERA too (Liu, Li, Lee, 2020, arXiv 2007.06028), over labelled cells.

    Args:
        hidden: bool, of a shape that expands to that of `guess` and `target`.
    """
    return known_mean((wide(guess) - wide(target)).abs(), hidden)


def feature_regression(guess_BMD: Tensor, features_BMD: Tensor) -> Tensor:
    """Smooth L1 distance of guesses to features that are standardised one by one (a layer norm without weights), mean
    over all numbers, a scalar in float32 or wider; 0 without any.

    Source: the authors' code of I-JEPA (Assran et al., 2023, arXiv 2301.08243); the paper's eq. 1 has the squared
    distance.

    Args:
        features_BMD: of a teacher; no gradient goes into them.
    """
    target_BMD = _standardised(features_BMD)
    return mean_of(F.smooth_l1_loss(wide(guess_BMD), target_BMD, reduction="sum"), guess_BMD.numel())


def feature_absolute_error(guess_BMD: Tensor, features_BMD: Tensor) -> Tensor:
    """As `feature_regression`, of |guess - target|: the loss of V-JEPA (Bardes et al., 2024, arXiv 2404.08471, eq. 1,
    and the authors' code, which standardises).
    """
    return mean((wide(guess_BMD) - _standardised(features_BMD)).abs())


def _standardised(features_BMD: Tensor) -> Tensor:
    """Each patch's features with mean 0 and variance 1, or all 0 where they are equal; without gradients."""
    return F.layer_norm(wide(features_BMD.detach()), features_BMD.shape[-1:])
