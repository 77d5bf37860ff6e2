"""InfoNCE in its forms: which keys an anchor should tell from which others.

Source: van den Oord et al., "CPC", 2018, arXiv 1807.03748, eq. 4. All forms but Hydra's are one cross-entropy,
`soft_info_nce`, and differ in keys and targets:

| form              | keys of an anchor                              | target                                     |
|-------------------|------------------------------------------------|--------------------------------------------|
| `nt_xent`         | all rows of both views but the anchor itself   | the other view (SimCLR, 2002.05709, eq. 1) |
| `paired_info_nce` | the other encoder's rows                       | its pair (CLIP, MoCo v3), or any shares    |
| `queued_info_nce` | its pair, and rows that a queue kept           | its pair (MoCo, 1911.05722, eq. 1)         |
| `supcon.supcon`   | all rows but the anchor itself                 | all rows of its class, in equal shares     |

Hydra's, `class_pair_loss`, has a denominator for each positive: Wu et al., "Rethinking Positive Pairs in Contrastive
Learning", 2024, arXiv 2410.18200, and their code: cosine behind a gate, masks of class pairs. That code subtracts the
mean of a row before it exponentiates, which overflows at low temperatures; here it is the largest. It forms all gated
rows, B N D numbers; here the norms of these come from a product of matrices. Its negatives are those of one rank, here
of all. With equal classes and without a gate it is not SupCon: an anchor is its own positive, no other positive stands
in a denominator, and each pair weighs the same.

Embeddings need not be normalised, ranks may differ in their rows, and a temperature may be a tensor that is trained.
Shapes: B anchors of this rank, N keys of all ranks, K rows of a queue, D embedding width. Half precision is widened to
float32, also under autocast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums, gather_rows
from lightspan.core.ranges import require_temperatures

LEAST_NORM = 1e-12
"""A shorter row counts as zero: its cosine with any row is 0, without a gradient."""


def gated_cosine(z_BD: Tensor, key_ND: Tensor, gate_BD: Tensor | None = None) -> Tensor:
    """cos(z_b * g_b, k_n * g_b), [B N]: the anchor's gate acts on both sides.

    Takes memory for a few matrices [B N] and none of [B N D]: |k_n * g_b|^2 = sum_d k_nd^2 g_bd^2.

    Args:
        gate_BD: weights of the dimensions for each anchor; None keeps all of them.
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        if gate_BD is None:
            return unit(z_BD) @ unit(key_ND).T
        z_BD, key_ND = wide(z_BD), wide(key_ND)
        weight_BD = wide(gate_BD).square()
        own_B1 = (z_BD.square() * weight_BD).sum(dim=1, keepdim=True)
        squares_BN = weight_BD @ key_ND.square().T
        return (z_BD * weight_BD) @ key_ND.T * _inverse_root(own_B1) * _inverse_root(squares_BN)


def unit(x_BD: Tensor) -> Tensor:
    """Rows at length 1, in float32 or wider, for a loss: a row shorter than `LEAST_NORM` becomes zero and has no
    gradient, where torch's `normalize` multiplies it by 1 / `LEAST_NORM`. What is measured and not trained takes
    `lightspan.evaluation.rows.unit_rows`.
    """
    x_BD = wide(x_BD)
    return x_BD * _inverse_root(x_BD.square().sum(dim=1, keepdim=True))


def row_cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """cos(a_b, b_b) of the rows of two tensors, [B], as `unit` has them."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return (unit(a_BD) * unit(b_BD)).sum(dim=1)


def _inverse_root(squares: Tensor) -> Tensor:
    """1 / sqrt, and 0 with a gradient of 0 below the square of `LEAST_NORM`."""
    return squares.masked_fill(squares < LEAST_NORM**2, torch.inf).rsqrt()


def soft_info_nce(logits_BN: Tensor, target_BN: Tensor, seen_BN: Tensor | None = None) -> Tensor:
    """Mean over anchors b of -sum_n t_bn log(exp s_bn / sum_a exp s_ba), where a runs over the keys that b sees.

    The mean runs over the anchors of all ranks that have a target; without any such anchor the loss is 0.

    Args:
        logits_BN: s, cosines over a temperature; any finite numbers. The logarithm of a weight >= 1 may be added.
        target_BN: t >= 0, the share of each key; rows sum to 1, or to 0 for an anchor without a say. Zero where
            `seen_BN` is False.
        seen_BN: bool, the keys in an anchor's denominator; None for all.
    Returns: scalar, the same on all ranks.
    """
    logits_BN = wide(logits_BN)
    seen = logits_BN
    if seen_BN is not None:
        # The least number in place of -inf, which would give the only row of a batch a gradient of NaN.
        seen = logits_BN.masked_fill(~seen_BN, torch.finfo(logits_BN.dtype).min)
    # An anchor that sees no key, as without rows on any rank, has no logsumexp.
    all_B1 = seen.logsumexp(dim=1, keepdim=True) if seen.shape[1] else seen.new_zeros(len(seen), 1)
    target_BN = target_BN.to(logits_BN.dtype)
    loss_B = (target_BN * (all_B1 - logits_BN)).sum(dim=1)
    total, anchors = all_reduce_sums(loss_B.sum(), (target_BN != 0).any(dim=1).sum().to(loss_B.dtype))
    return total / anchors.clamp_min(1)


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, temperature: float | Tensor = 0.5) -> Tensor:
    """Both views of an image find one another among all rows of both views of all ranks, with gradients.

    An image that is alone on all ranks gives 0.

    Args:
        z1_BD, z2_BD: row i of both comes from image i.
    Returns: scalar >= 0, the same on all ranks; a mean over 2 N anchors.
    Raises: UserError for a temperature of 0 or less or infinity, if it is no tensor.
    """
    require_temperatures(temperature=temperature)
    z_BD = torch.cat([z1_BD, z2_BD])
    key_ND, first = gather_rows(z_BD)
    own_BN = own_rows(len(z_BD), first, key_ND)
    return soft_info_nce(gated_cosine(z_BD, key_ND) / temperature, own_BN.roll(len(z1_BD), dims=0), ~own_BN)


def paired_info_nce(
    query_BD: Tensor,
    key_BD: Tensor,
    temperature: float | Tensor = 0.2,
    target_BN: Tensor | None = None,
    known_B: Tensor | None = None,
) -> Tensor:
    """Each query finds the key of its pair among the keys of all ranks, which have gradients if they require them.

    One direction; CLIP (2103.00020, section 2.3) takes the mean of both.

    Args:
        query_BD, key_BD: row i of both is a pair.
        target_BN: shares of the keys of all ranks, in their order, for each query; None gives its own pair all.
        known_B: bool, which rows are pairs at all: the keys of others are not seen, and their queries have no say. None
            is all of them.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError as `nt_xent` does.
    """
    require_temperatures(temperature=temperature)
    key_ND, first = gather_rows(key_BD)
    target_BN = own_rows(len(query_BD), first, key_ND) if target_BN is None else target_BN
    logits_BN, seen_BN = gated_cosine(query_BD, key_ND) / temperature, None
    if known_B is not None:
        seen_BN = (gather_rows(known_B.long())[0] > 0).expand_as(logits_BN)
        target_BN = target_BN * (seen_BN & known_B[:, None])
    return soft_info_nce(logits_BN, target_BN, seen_BN)


def crossed_info_nce(queries: Sequence[Tensor], keys: Sequence[Tensor], temperature: float | Tensor = 0.2) -> Tensor:
    """2 tau times the sum of `paired_info_nce` of either view's queries with the other view's keys.

    Source: MoCo v3 (2104.02057, algorithm 1) and the code of SiT (2104.03602). For orthonormal rows with equal queries
    and keys each direction is 2 tau (log(exp(1 / tau) + N - 1) - 1 / tau).

    Args:
        queries, keys: of two views each, [B D]; row i of all four comes from image i.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError as `nt_xent` does.
    """
    (q1_BD, q2_BD), (k1_BD, k2_BD) = queries, keys
    both = paired_info_nce(q1_BD, k2_BD, temperature) + paired_info_nce(q2_BD, k1_BD, temperature)
    return 2 * temperature * both


def queued_info_nce(query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Each query finds the key of its pair among that and the rows of a queue; keys of other rows have no say.

    Args:
        query_BD, key_BD: row i of both is a pair.
        queue_KD: the same on all ranks, such as `lightspan.nn.teachers.feature_queue.FeatureQueue` gives; may be empty.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError as `nt_xent` does.
    """
    require_temperatures(temperature=temperature)
    own_B1 = row_cosine(query_BD, key_BD)[:, None]
    logits = torch.cat([own_B1, gated_cosine(query_BD, queue_KD)], dim=1) / temperature
    target = torch.zeros_like(logits, dtype=torch.bool)
    target[:, 0] = True
    return soft_info_nce(logits, target)


def own_rows(rows: int, first: int, key_ND: Tensor) -> Tensor:
    """Bool [rows N], where key n is row n - first of this rank, as `gather_rows` gives them."""
    own_R = torch.arange(first, first + rows, device=key_ND.device)
    return own_R[:, None] == torch.arange(len(key_ND), device=key_ND.device)


def class_pair_masks(label_B: Tensor, partner_B: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """(positives, negatives), bool [B N]: keys of the partner's class, and keys of neither class of the pair.

    Keys of the anchor's own class are neither, unless it is its own partner.
    """
    positive_BN = label_N == partner_B[:, None]
    return positive_BN, ~positive_BN & (label_N != label_B[:, None])


def multi_positive_info_nce(logits_BN: Tensor, positive_BN: Tensor, negative_BN: Tensor) -> Tensor:
    """Mean over all pairs (b, p), p a positive of b, of log(exp s_bp + sum_n exp s_bn) - s_bp, n the negatives of b.

    Each positive stands in its own denominator alone. The mean runs over the pairs of all ranks. An anchor without a
    positive does not count, one without a negative adds 0 to the sum; without any pair the loss is 0.

    Args:
        logits_BN: s, cosines over a temperature; any finite numbers.
        positive_BN, negative_BN: bool, what is neither is left out.
    Returns: scalar >= 0, the same on all ranks.
    """
    logits_BN = wide(logits_BN)
    # The least number in place of -inf, which would give an anchor without negatives a gradient of NaN.
    negatives_B1 = logits_BN.masked_fill(~negative_BN, torch.finfo(logits_BN.dtype).min).logsumexp(dim=1, keepdim=True)
    terms_BN = -F.logsigmoid(logits_BN - negatives_B1)
    total, pairs = all_reduce_sums(terms_BN.masked_fill(~positive_BN, 0).sum(), positive_BN.sum().to(logits_BN.dtype))
    return total / pairs.clamp_min(1)


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
    require_temperatures(temperature=temperature)
    key_ND, _ = gather_rows(z_BD)
    label_N, _ = gather_rows(label_B)
    logits_BN = gated_cosine(z_BD, key_ND, gate_BD) / temperature
    return multi_positive_info_nce(logits_BN, *class_pair_masks(label_B, partner_B, label_N))
