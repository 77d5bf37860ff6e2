"""Which units, and which groups of units, of two networks say the same of the same samples.

Source: Li, Yosinski, Clune, Lipson, Hopcroft, "Convergent Learning: Do different neural networks learn the same
representations?", ICLR 2016, arXiv 1511.07543: one to one (section 3), one to few (4), many to many (5). A unit whose
value never changes has no correlation and is left out. Correlations keep their sign in a matching, as theirs: a partner
of the opposite sign is none. Positions of one image are not independent samples. Not here: matching by mutual
information, which agrees with correlation for most units, and the tree of clusters of the first layer.
Shapes: N samples, S units of the first network, T of the second, K clusters.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import softshrink

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.evaluation.geometry.clustering import spectral
from lightspan.evaluation.geometry.moments import Moments

ITERATIONS = 1000
CLOSE = 1e-6
"""Of the largest weight: where a sparse map moves by less, it is found."""
FLAT = 1e-10
"""Of the largest eigenvalue, or of the variance 1: what is less was made by rounding."""


def correlations(moments: Moments, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Within the first [S S], between both [S T], within the second [T T]; zeros for a unit that never changes.

    Args:
        moments: of rows (first, second) side by side as one class, of any batches and ranks.
        width: S.
    """
    xx, xy, yy = moments.between(width)
    x_S, y_T = (scatter.diagonal().clamp_min(0).sqrt() for scatter in (xx, yy))
    return tuple(  # type: ignore[return-value]
        torch.where(scale > 0, scatter / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)
        for scatter, scale in ((xx, x_S[:, None] * x_S), (xy, x_S[:, None] * y_T), (yy, y_T[:, None] * y_T))
    )


def matched(between_ST: Tensor) -> tuple[Tensor, Tensor]:
    """(units of the first, their partners), int64 [min(S, T)]: the matching with the largest sum, each unit once."""
    rows, columns = linear_sum_assignment(between_ST.cpu().numpy(), maximize=True)
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)


def semi_matched(between_ST: Tensor) -> Tensor:
    """The best partner of each unit, int64 [S]; partners may repeat."""
    return between_ST.argmax(dim=1)


def standardised(x_NS: Tensor) -> Tensor:
    """Units less their mean over their deviation, in float64; zeros for one that never changes."""
    moments = Moments.of(x_NS)
    deviation_S = (moments.within_DD.diagonal() / max(len(x_NS), 1)).sqrt()
    x_NS = x_NS.double() - moments.mean_CD
    return torch.where(deviation_S > 0, x_NS / torch.where(deviation_S > 0, deviation_S, 1), 0)


def sparse_map(x_NS: Tensor, y_NT: Tensor, penalty: float, start_ST: Tensor | None = None) -> Tensor:
    """M [S T] that minimises |X M - Y|^2 / (2 N) + penalty |M|_1, for units standardised beforehand.

    By accelerated proximal steps (Beck, Teboulle, "FISTA", 2009) that begin anew where they overshoot. Without a
    penalty it is the shortest of all least-squares solutions. Predicting the mean has half a square a unit.

    Args:
        penalty: at least 0.
        start_ST: near M; zeros if None.
    """
    require_in("[0, inf)", penalty=penalty)
    count = max(len(x_NS), 1)
    gram_SS, cross_ST = x_NS.T @ x_NS / count, x_NS.T @ y_NT / count
    values_S, vectors_SS = torch.linalg.eigh(gram_SS)
    largest = float(values_S[-1]) if len(values_S) else 0.0
    if largest <= 0:
        return torch.zeros_like(cross_ST)
    if not penalty:
        inverse_S = torch.where(values_S > FLAT * largest, 1 / values_S.clamp_min(FLAT * largest), 0)
        return vectors_SS @ (inverse_S[:, None] * (vectors_SS.T @ cross_ST))
    map_ST = torch.zeros_like(cross_ST) if start_ST is None else start_ST
    ahead_ST, momentum = map_ST, 1.0
    for _ in range(ITERATIONS):
        stepped_ST = ahead_ST - (gram_SS @ ahead_ST - cross_ST) / largest
        next_ST = softshrink(stepped_ST, penalty / largest)
        moved_ST = next_ST - map_ST
        if float(((ahead_ST - next_ST) * moved_ST).sum()) > 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_ST = next_ST + (momentum - 1) / grown * moved_ST
        map_ST, momentum = next_ST, grown
        if float(moved_ST.abs().max()) <= CLOSE * float(next_ST.abs().max()):
            break
    return map_ST


def half_square(x_NS: Tensor, map_ST: Tensor, y_NT: Tensor) -> float:
    """|X M - Y|^2 / (2 N T): 0.5 for predicting the mean of standardised units, 0 for a map that is right."""
    return float((x_NS @ map_ST - y_NT).square().mean() / 2) if y_NT.numel() else 0.0


def explained(fit: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> float:
    """The subspace test: the share of the second units' variance on held-out rows that least squares on the first
    explain, of all units together. At most 1, below 0 for a map that is worse than the mean, and 0 where none of these
    units changes there.

    Args:
        fit, held: (first [N S], second [N T]), standardised.
    """
    variance = float(held[1].var(dim=0, correction=0).sum())
    left = float((held[0] @ sparse_map(*fit, 0.0) - held[1]).square().mean(dim=0).sum())
    return 1 - left / variance if variance > FLAT else 0.0


def joint_clusters(
    within_SS: Tensor, between_ST: Tensor, within_TT: Tensor, clusters: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The cluster of each unit of the first and of the second network, int64 [S] and [T], by normalised spectral
    clustering of both networks' units, joined by the size of their correlations.

    Raises: UserError for more clusters than units.
    """
    upper, lower = torch.cat([within_SS, between_ST], dim=1), torch.cat([between_ST.T, within_TT], dim=1)
    affinity = torch.cat([upper, lower]).abs()
    found = spectral(affinity, clusters, seed)
    return found[: len(within_SS)], found[len(within_SS) :]


def shared_clusters(first_S: Tensor, second_T: Tensor) -> list[int]:
    """The clusters that hold units of both networks, ascending."""
    return sorted(set(first_S.tolist()) & set(second_T.tolist()))


def require_penalties(penalties: Sequence[float]) -> None:
    """Raises: UserError for penalties below 0, or none."""
    if not penalties:
        raise UserError("penalties is empty; give at least one, such as 0")
    require_in("[0, inf)", penalties=penalties)
