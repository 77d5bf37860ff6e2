"""Contrast for numbers to be predicted: harder negatives and positives mixed from embeddings, and distance as weight.

Source: Wu et al., "Mixup Your Own Pairs" (SupReMix), 2023, arXiv 2309.16633: anchors' mixtures with another target are
negatives, mixtures of a lower and a higher target that give the anchor's are positives, and every term of a denominator
is weighed by its target's distance. The authors' code subtracts the largest logit of real rows and of mixtures apart,
which shifts the weight of one kind against the other; here one denominator has both. It forms (2N)^3 vectors; a product
with a mixture is the mixture of two products, so that here there are only numbers.
Shapes: B anchors of this rank, N rows of all ranks, S mixed pairs of an anchor, D embedding width.
"""

import torch
from torch import Tensor

from lightspan.core.devices import has_values, wide
from lightspan.core.distributed import all_reduce_sums, gather_rows
from lightspan.core.ranges import require_in, require_temperatures
from lightspan.objectives.info_nce import own_rows, unit


def supremix(
    z_BD: Tensor,
    target_B: Tensor,
    own_share_B: Tensor | None = None,
    window: float = 5.0,
    distance_weight: float = 1.0,
    temperature: float | Tensor = 0.3,
    most_pairs: int | None = None,
    start_B: Tensor | None = None,
) -> Tensor:
    """Mean over anchors i of -1 / |P_i| sum_p [s_ip - log sum_a w_ia exp s_ia], s a product over the temperature.

    P_i are the rows of i's target and its mixed positives; a runs over those, all other rows, and i's mixed negatives;
    w_ia = 1 + distance_weight * |y_i - y_a|. Mixtures are constants, not scaled to length 1. Without own shares, window
    and distance weight this is `supcon`. An anchor without a positive is left out of the mean.

    Args:
        z_BD: embeddings, of any length; they are scaled to 1. Ranks may differ in B. Half precision is widened to
            float32, also under autocast.
        target_B: y, one number a row; rows of equal numbers are positives, so continuous ones are to be rounded.
        own_share_B: l in [0, 1], the anchor's share in its mixtures with each row of another target, which are
            negatives; None makes none.
        window: mixed positives come from pairs of a lower and a higher target that are both nearer to the anchor's than
            this, in the unit of the target; at 0 there are none.
        distance_weight: >= 0.
        temperature: > 0; a tensor may be trained.
        most_pairs: pairs of an anchor that are mixed. An anchor with more takes this many, evenly spaced, and each
            counts for those that it stands for; None takes all.
        start_B: in [0, 1), where the evenly spaced pairs begin; drawn uniformly, all pairs have the same chance. None
            is 0.5.
    Returns: scalar, the same on all ranks; 0 without any positive.
    Raises: UserError for a window or a weight below 0, fewer than 1 pair, or a temperature that is not above 0.
    """
    require_temperatures(temperature=temperature)
    require_in("[0, inf)", window=window, distance_weight=distance_weight)
    require_in("[1, inf)", most_pairs=most_pairs)
    key_ND, first = gather_rows(z_BD)
    # Targets keep float32 or more: bfloat16 would make one of neighbouring numbers.
    target_N, _ = gather_rows(wide(target_B))
    with torch.autocast(z_BD.device.type, enabled=False):
        real_BN = unit(z_BD) @ unit(key_ND).T
        constant_BN = unit(z_BD) @ unit(key_ND).detach().T  # what mixtures are made of
    own_BN = own_rows(len(z_BD), first, key_ND)
    distance_BN = (wide(target_B)[:, None] - target_N).abs().to(real_BN.dtype)
    positive_BN = (distance_BN == 0) & ~own_BN

    # Of each kind of term: products, how often a term counts as positive, and its weight in denominators, 0 for none.
    terms = [(real_BN, positive_BN.to(real_BN.dtype), (1 + distance_weight * distance_BN) * ~own_BN)]
    if own_share_B is not None:
        share_B1 = own_share_B.to(real_BN.dtype)[:, None]
        with_itself_B1 = (constant_BN * own_BN).sum(dim=1, keepdim=True)
        mixed_BN = share_B1 * with_itself_B1 + (1 - share_B1) * constant_BN
        weight_BN = (1 + distance_weight * (1 - share_B1) * distance_BN) * (distance_BN > 0)
        terms.append((mixed_BN, torch.zeros_like(mixed_BN), weight_BN))
    if window > 0:
        mixed_BS, stands_for_BS = _mixed_positives(constant_BN, wide(target_B), target_N, window, most_pairs, start_B)
        terms.append((mixed_BS, stands_for_BS, stands_for_BS))
    product, count, weight = (torch.cat(parts, dim=1) for parts in zip(*terms, strict=True))
    s = product / temperature
    # The least number in place of -inf, which would give the only row of a batch a gradient of NaN.
    seen = torch.where(weight > 0, s + weight.clamp_min(torch.finfo(s.dtype).tiny).log(), torch.finfo(s.dtype).min)
    all_B1 = seen.logsumexp(dim=1, keepdim=True) if seen.shape[1] else seen.new_zeros(len(seen), 1)
    count_B = count.sum(dim=1)
    loss_B = (count * (all_B1 - s)).sum(dim=1) / count_B.clamp_min(1)
    total, anchors = all_reduce_sums(loss_B.sum(), (count_B > 0).sum().to(loss_B.dtype))
    return total / anchors.clamp_min(1)


def mixed_pairs(
    target_B: Tensor, target_N: Tensor, window: float, most_pairs: int | None = None, start_B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(j, k, a, stands_for), each [B S]: rows with y_j < y_i < y_k, both nearer than `window`, and the share of j for
    which a y_j + (1 - a) y_k = y_i.

    `stands_for` is the number of pairs that one stands for, 1 if all are there, and 0 where an anchor has fewer than S.
    Of rows in the order of their targets, those below an anchor and those above it are two runs, so that the pairs
    count from 0 without a table of all of them.

    Args:
        most_pairs, start_B: as in `supremix`.
    """
    sorted_N, order_N = target_N.sort(stable=True)
    first_below_B = torch.searchsorted(sorted_N, target_B - window, right=True)
    first_above_B = torch.searchsorted(sorted_N, target_B, right=True)
    below_B = torch.searchsorted(sorted_N, target_B) - first_below_B
    above_B = torch.searchsorted(sorted_N, target_B + window) - first_above_B
    pairs_B1 = (below_B * above_B)[:, None]
    if most_pairs is None:
        # A plan has no numbers; as many lower as higher ones give the most pairs.
        most_pairs = int(pairs_B1.max()) if has_values(pairs_B1) and len(pairs_B1) else (len(target_N) // 2) ** 2
    place_S = torch.arange(most_pairs, device=target_B.device)
    start_B1: float | Tensor = 0.5 if start_B is None else start_B[:, None].to(target_B.dtype)
    spread_BS = (place_S * pairs_B1 + (start_B1 * pairs_B1).long()) // max(most_pairs, 1)
    number_BS = torch.where(pairs_B1 > most_pairs, spread_BS, place_S)
    there_BS = number_BS < pairs_B1
    number_BS, above_B1 = number_BS * there_BS, above_B[:, None].clamp_min(1)
    last = max(len(target_N) - 1, 0)
    j_BS = order_N[(first_below_B[:, None] + number_BS // above_B1).clamp_max(last)]
    k_BS = order_N[(first_above_B[:, None] + number_BS % above_B1).clamp_max(last)]
    below_BS, above_BS = target_N[j_BS], target_N[k_BS]
    a_BS = torch.where(there_BS, (above_BS - target_B[:, None]) / (above_BS - below_BS).where(there_BS, 1), 0.5)
    return j_BS, k_BS, a_BS, there_BS * (pairs_B1 / max(most_pairs, 1)).clamp_min(1)


def _mixed_positives(
    constant_BN: Tensor,
    target_B: Tensor,
    target_N: Tensor,
    window: float,
    most_pairs: int | None,
    start_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Products with the mixed positives of each anchor, and how many pairs each stands for, [B S]."""
    j_BS, k_BS, a_BS, stands_for_BS = mixed_pairs(target_B, target_N, window, most_pairs, start_B)
    a_BS = a_BS.to(constant_BN.dtype)
    mixed_BS = a_BS * constant_BN.gather(1, j_BS) + (1 - a_BS) * constant_BN.gather(1, k_BS)
    return mixed_BS, stands_for_BS.to(constant_BN.dtype)
