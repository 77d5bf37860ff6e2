"""How much task vectors are in each other's way, tensor by tensor: lengths, directions, signs and subspaces.

- length: |tau_i| over |theta_0|; a merge adds what is long.
- cosine of pairs of vectors; near 0 they are orthogonal, as arXiv 2212.04089 (its section 6) finds of good merges.
- sign conflicts (arXiv 2306.01708, its section 3): of the entries that at least two vectors change, by their trimmed
  largest magnitudes, the share in which not all go one way. Two vectors of independent signs have a half.
- overlap of subspaces: of the r strongest singular directions of the changes of a matrix, mean squared cosine of the
  principal angles, |U_i' U_j|_F^2 / r, mean over pairs; 1 is one subspace, 0 are orthogonal ones. On the side of the
  outputs and on that of the inputs; r is the least that the compared ones have. Random subspaces of n dimensions
  overlap by r / n in the mean, and in 95 of 100 draws by no more than `floor`: what is above is shared.

Shapes: K tasks, S shape of a tensor, O I a matrix (a kernel read as outputs x everything else), r directions.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from lightspan.merging.span import difference
from lightspan.merging.ties import least_kept, trim
from lightspan.subspaces.svd import thin_svd

DRAWS = 100
"""Pairs of random subspaces that a floor is the 95th percentile of."""


def vectors_of(base_S: Tensor, models_S: Sequence[Tensor]) -> list[Tensor]:
    """tau_i in float64."""
    return [difference(model_S.double(), base_S.double()) for model_S in models_S]


def relative_lengths(base_S: Tensor, vectors_S: Sequence[Tensor]) -> list[float] | None:
    """|tau_i| / |theta_0|; None for a tensor that is zero in the base."""
    length = float(base_S.double().norm())
    return [float(tau_S.norm()) / length for tau_S in vectors_S] if length else None


def mean_cosine(vectors_S: Sequence[Tensor]) -> float | None:
    """Of all pairs that both have a direction, that is are not zero; None where there is no such pair."""
    unit = [tau_S / norm for tau_S in vectors_S if (norm := float(tau_S.norm()))]
    pairs = [float((a * b).sum()) for a, b in combinations(unit, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def sign_conflicts(vectors_S: Sequence[Tensor], density: float) -> tuple[int, int]:
    """(entries that at least two of the vectors change, those of them with different signs), of vectors that are each
    trimmed to this share of the tensor's entries.
    """
    magnitudes = [tau_S.float().abs().flatten() for tau_S in vectors_S]
    least = [least_kept(partial(iter, [flat]), flat.numel(), density) for flat in magnitudes]
    kept = [trim(tau_S, at) for tau_S, at in zip(vectors_S, least, strict=True)]
    signs_KS = torch.stack(kept).sign()
    shared_S = (signs_KS != 0).sum(dim=0) > 1
    split_S = shared_S & (signs_KS.sum(dim=0).abs() < signs_KS.abs().sum(dim=0))
    return int(shared_S.sum()), int(split_S.sum())


def rounding(model_S: Tensor) -> float:
    """The largest singular value that rounding a matrix to its dtype adds to it: of independent errors of half a unit
    in the last place, the largest norm of a row plus that of a column. 0 for what has fewer than two dimensions.
    """
    if model_S.ndim < 2 or not model_S.numel():
        return 0.0
    matrix_OI = model_S.flatten(1).double()
    norms = (float(matrix_OI.norm(dim=dim).max()) for dim in (0, 1))
    return torch.finfo(model_S.dtype).eps / 2 * sum(norms)


def directions(tau_S: Tensor, rank: int, noise: float = 0.0) -> tuple[Tensor, Tensor] | None:
    """The strongest singular directions of a change, orthonormal columns of the outputs [O r] and inputs [I r]; None
    where there is none.

    r is `rank`, or less: half of the shorter side, so that random ones could miss it, and no more than have singular
    values above `noise` and above a millionth of the largest. The others are rounding, and their directions chance.
    """
    if tau_S.ndim < 2:
        return None
    matrix_OI = tau_S.flatten(1)
    rank = min(rank, min(matrix_OI.shape) // 2)
    if rank < 1:
        return None
    left_OK, values_K, right_KI = thin_svd(matrix_OI)
    rank = min(rank, int((values_K > max(noise, 1e-6 * float(values_K[0]))).sum()))
    return (left_OK[:, :rank], right_KI[:rank].mT) if rank else None


def overlap(frames_NR: Sequence[Tensor]) -> float:
    """Mean over pairs of subspaces of the mean squared cosine of their principal angles, in [0, 1]."""
    pairs = [float((a.mT @ b).square().sum()) / a.shape[1] for a, b in combinations(frames_NR, 2)]
    return sum(pairs) / max(1, len(pairs))


def floor(dimensions: int, rank: int, subspaces: int, seed: int = 0) -> float:
    """What 95 of 100 draws of so many random subspaces overlap by at most."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(DRAWS):
        frames = torch.randn(subspaces, dimensions, rank, generator=generator, dtype=torch.float64)
        found.append(overlap(list(torch.linalg.qr(frames).Q)))
    return float(torch.tensor(found).quantile(0.95))
