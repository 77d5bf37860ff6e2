"""InfoNCE with any number of positives, any rows left out, and cosines taken in a subspace of each anchor's own.

Source: Wu et al., "Rethinking Positive Pairs in Contrastive Learning" (Hydra), 2024, arXiv 2410.18200, and their code:
cosine behind a gate, masks of class pairs, one denominator for each positive. That code subtracts the mean of a row
before it exponentiates, which overflows at low temperatures; here it is the largest. It forms all gated rows, B N D
numbers; here the norms of these come from a product of matrices. Its negatives are those of one rank, here of all.
With equal classes and without a gate it is not SupCon, which is `lightspan.objectives.supcon`: an anchor is its own
positive, no other positive stands in a denominator, and each pair weighs the same.
Shapes: B anchors of this rank, N keys of all ranks, D embedding width. Half precision is widened to float32, also under
autocast.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.devices import wide
from lightspan.distributed import all_reduce_sums, gather_rows
from lightspan.errors import UserError

LEAST_NORM = 1e-12
"""A shorter row counts as zero: its cosine with any row is 0, without a gradient."""


def gated_cosine(z_BD: Tensor, key_ND: Tensor, gate_BD: Tensor | None = None) -> Tensor:
    """cos(z_b * g_b, k_n * g_b), [B N]: the anchor's gate acts on both sides.

    Takes memory for a few matrices [B N] and none of [B N D]: |k_n * g_b|^2 = sum_d k_nd^2 g_bd^2.

    Args:
        gate_BD: weights of the dimensions for each anchor; None keeps all of them.
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        z_BD, key_ND = wide(z_BD), wide(key_ND)
        if gate_BD is None:
            return _unit(z_BD) @ _unit(key_ND).T
        weight_BD = wide(gate_BD).square()
        own_B1 = (z_BD.square() * weight_BD).sum(dim=1, keepdim=True)
        squares_BN = weight_BD @ key_ND.square().T
        return (z_BD * weight_BD) @ key_ND.T * _inverse_root(own_B1) * _inverse_root(squares_BN)


def _unit(x_BD: Tensor) -> Tensor:
    return x_BD * _inverse_root(x_BD.square().sum(dim=1, keepdim=True))


def _inverse_root(squares: Tensor) -> Tensor:
    """1 / sqrt, and 0 with a gradient of 0 below the square of `LEAST_NORM`."""
    return squares.masked_fill(squares < LEAST_NORM**2, torch.inf).rsqrt()


def class_pair_masks(label_B: Tensor, partner_B: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """(positives, negatives), bool [B N]: keys of the partner's class, and keys of neither class of the pair.

    Keys of the anchor's own class are neither, unless it is its own partner.
    """
    positive_BN = label_N == partner_B[:, None]
    return positive_BN, ~positive_BN & (label_N != label_B[:, None])


def multi_positive_info_nce(logits_BN: Tensor, positive_BN: Tensor, negative_BN: Tensor) -> Tensor:
    """Mean over all pairs (b, p), p a positive of b, of log(exp s_bp + sum_n exp s_bn) - s_bp, n the negatives of b.

    Each positive stands in its own denominator alone. The mean runs over the pairs of all ranks. An anchor without a
    positive has no say, one without a negative adds 0 to the sum; without any pair the loss is 0.

    Args:
        logits_BN: s, cosines over a temperature; any finite numbers.
        positive_BN, negative_BN: bool, what is neither is left out.
    Returns: scalar >= 0, the same on all ranks.
    """
    logits_BN = wide(logits_BN)
    # The least number in the place of -inf, which would give an anchor without negatives a gradient of NaN.
    negatives_B1 = logits_BN.masked_fill(~negative_BN, torch.finfo(logits_BN.dtype).min).logsumexp(dim=1, keepdim=True)
    terms_BN = -F.logsigmoid(logits_BN - negatives_B1)
    total, pairs = all_reduce_sums(terms_BN.masked_fill(~positive_BN, 0).sum(), positive_BN.sum().to(logits_BN.dtype))
    return total / pairs.clamp_min(1)


def require_temperature(temperature: float | Tensor) -> None:
    """Raises: UserError for a number that is not finite and above 0. Tensors are not read: they may be on a device."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise UserError(f"temperature={temperature} must be above 0 and finite; 0.05 to 0.5 are usual")


def class_pair_loss(
    z_BD: Tensor,
    label_B: Tensor,
    partner_B: Tensor,
    gate_BD: Tensor | None = None,
    temperature: float | Tensor = 0.1,
) -> Tensor:
    """Hydra's loss: rows of the partner's class are an anchor's positives, in the subspace of its gate.

    Keys are the rows of all ranks, with gradients. The diagonal stays: an anchor that is its own partner is one of its
    positives, with cosine 1. A partner class that no rank has a row of leaves the anchor without a say.

    Args:
        z_BD: embeddings, not normalised; ranks may differ in B.
        label_B, partner_B: int64, the class pair (y1, y2) of each anchor.
        gate_BD: g(y1, y2); None keeps all dimensions.
        temperature: > 0; a tensor may be trained.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError for a temperature of 0 or less, if it is no tensor.
    """
    require_temperature(temperature)
    key_ND, _ = gather_rows(z_BD)
    label_N, _ = gather_rows(label_B)
    logits_BN = gated_cosine(z_BD, key_ND, gate_BD) / temperature
    return multi_positive_info_nce(logits_BN, *class_pair_masks(label_B, partner_B, label_N))
