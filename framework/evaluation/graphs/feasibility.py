"""W2PGNN: whether pre-training on some collections of graphs can help on another one, before any network is trained.

Source: Cao et al., "When to Pre-Train Graph Neural Networks? From Data Generation Perspective!", 2023, arXiv
2303.16458, section 4. Graphons B_1, ..., B_k of what there is to pre-train on span a space of generators, and with the
graphon W of the graphs that the task has
zeta = - min over alpha in the simplex of GW(sum_i alpha_i B_i, W), where
GW(C, D)^2 = min over couplings T of uniform weights of sum_ijkl (C_ik - D_jl)^2 T_ij T_kl.
alpha = softmax(theta) is found by Adam; the gradient is that of the cost at the best coupling T.
Differences from the paper: couplings are exact ones by conditional gradients, where it takes entropic ones with a
weight of 1e-5 while alpha is sought and exact ones at the end; corners of the simplex, which no softmax reaches, are
tried too; cells are fewer than its 1,000 a side, at which a distance takes minutes.
Not here: other estimators of graphons than sorting and smoothing.
Shapes: K graphons, R cells a side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.graphs.collection import GraphCollection
from lightspan.evaluation.graphs.graphons import clustered, graphon

Basis = Literal["domain", "integrated", "topological"]
LEARNING_RATE, BETAS, WEIGHT_DECAY, STEPS = 0.05, (0.9, 0.99), 1e-5, 100
MOST_STEPS = 500  # of conditional gradients, after which digits beyond the third are left where they turn to and fro
PATIENCE, PATIENT_FROM = 3, 30  # steps without a better mixture, after so many steps


def gw_cost(first_RR: np.ndarray, second_RR: np.ndarray, coupling_RR: np.ndarray) -> float:
    """sum_ijkl (C_ik - D_jl)^2 T_ij T_kl of symmetric matrices."""
    rows, columns = coupling_RR.sum(axis=1), coupling_RR.sum(axis=0)
    apart = rows @ first_RR**2 @ rows + columns @ second_RR**2 @ columns
    return float(apart - 2 * ((coupling_RR.T @ first_RR @ coupling_RR) * second_RR).sum())


def gw_coupling(first_RR: np.ndarray, second_RR: np.ndarray, starts: Sequence[np.ndarray] = ()) -> np.ndarray:
    """The coupling of uniform weights with the least cost that conditional gradients find, [R R].

    The cost has several minima: the search starts from the coupling of all with all, from that of equal places, from
    that of opposite ones, and from those given.
    """
    equal_RR = np.eye(len(first_RR)) / len(first_RR)
    tried = [np.full(first_RR.shape, 1 / first_RR.size), equal_RR, equal_RR[::-1].copy(), *starts]
    found = [descended(first_RR, second_RR, start) for start in tried]
    return min(found, key=lambda coupling: gw_cost(first_RR, second_RR, coupling))


def descended(first_RR: np.ndarray, second_RR: np.ndarray, coupling_RR: np.ndarray) -> np.ndarray:
    """What conditional gradients make of a coupling of uniform weights: each step goes towards the permutation that is
    best where it starts, as far as the cost falls.

    Source: Vayer et al., "Optimal Transport for structured data", 2018, arXiv 1805.09114, algorithms 1 and 2.
    """
    for _ in range(MOST_STEPS):
        slope_RR = -4 * first_RR @ coupling_RR @ second_RR
        rows, columns = linear_sum_assignment(slope_RR)
        way_RR = -coupling_RR
        way_RR[rows, columns] += 1 / len(first_RR)
        along, bend = (slope_RR * way_RR).sum(), -2 * ((first_RR @ way_RR @ second_RR) * way_RR).sum()
        if along > -1e-14:
            break
        coupling_RR = coupling_RR + (min(1.0, -along / (2 * bend)) if bend > 0 else 1.0) * way_RR
    return coupling_RR


def gw_distance(first_RR: np.ndarray, second_RR: np.ndarray) -> float:
    """The Gromov-Wasserstein distance of two graphons, at least 0."""
    return math.sqrt(max(0.0, gw_cost(first_RR, second_RR, gw_coupling(first_RR, second_RR))))


def nearest_mixture(basis_KRR: np.ndarray, down_RR: np.ndarray) -> tuple[np.ndarray, float]:
    """(alpha [K] in the simplex, GW distance) of the mixture of graphons that is nearest to another one."""
    weights = np.full(len(basis_KRR), 1 / len(basis_KRR))
    candidates = [weights, *np.eye(len(basis_KRR))] if len(basis_KRR) > 1 else [weights]
    if len(basis_KRR) > 1:
        candidates.append(_mixed(basis_KRR, down_RR))
    apart = [gw_distance(np.tensordot(alpha, basis_KRR, 1), down_RR) for alpha in candidates]
    best = int(np.argmin(apart))
    return candidates[best], apart[best]


def _mixed(basis_KRR: np.ndarray, down_RR: np.ndarray) -> np.ndarray:
    """The best alpha on the way of Adam from equal weights."""
    basis, down = torch.from_numpy(basis_KRR), torch.from_numpy(down_RR)
    theta_K = torch.zeros(len(basis), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta_K], LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    coupling_RR = gw_coupling(basis_KRR.mean(axis=0), down_RR)
    best, least, last = np.full(len(basis), 1 / len(basis)), math.inf, 0
    for step in range(STEPS):
        alpha_K = theta_K.softmax(0)
        mixed = torch.tensordot(alpha_K, basis, 1)
        coupling_RR = gw_coupling(mixed.detach().numpy(), down_RR, [coupling_RR])
        moved = torch.from_numpy(coupling_RR)
        rows = moved.sum(dim=1)
        cost = rows @ mixed.square() @ rows - 2 * ((moved.T @ mixed @ moved) * down).sum()
        if (now := float(cost.detach())) < least - 1e-12:
            best, least, last = alpha_K.detach().numpy().copy(), now, step
        elif step >= PATIENT_FROM and step - last >= PATIENCE:
            break
        adam.zero_grad()
        cost.backward()
        adam.step()
    return best


@dataclass(frozen=True)
class Feasibility(Result):
    """How near graphs of a task are to what others may have drawn; nearer to 0 is nearer.

    Attributes:
        zeta: at most 0; less the distance of the task's graphon to the nearest mixture.
        weights: of each graphon in that mixture.
        alone: zeta of each collection by itself.
        uniform: zeta of the mixture of equal weights.
    """

    zeta: float
    weights: Mapping[str, float]
    alone: Mapping[str, float]
    uniform: float

    def figures(self) -> tuple[Figure, ...]:
        nearest = max(self.alone, key=lambda name: self.alone[name])
        return (
            Figure("zeta", self.zeta),
            Figure(f"zeta of {nearest} alone, the nearest", self.alone[nearest]),
            Figure("zeta of equal weights", self.uniform),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        ranked = sorted(self.alone.items(), key=lambda one: -one[1])
        return tuple({"collection": name, "zeta": zeta, "weight": self.weights.get(name, "")} for name, zeta in ranked)

    def draw(self, axes: Any) -> None:
        names = sorted(self.alone, key=lambda name: self.alone[name])
        axes.barh([*names, "nearest mixture"], [*(self.alone[name] for name in names), self.zeta])
        axes.set_xlabel("zeta; nearer to 0 is more promising")


class W2PGNN(Estimator):
    """Ranks collections of graphs by how promising pre-training on them is for a task, from their edges alone.

    Args:
        basis: what the graphons are of: "domain" each collection, "integrated" all together, "topological" `clusters`
            kinds of graphs among all, by k-means on statistics.
        cells: R; 30 to 100.
        clusters: at least 1.
    Raises: UserError for settings below 1.
    """

    def __init__(self, basis: Basis = "domain", cells: int = 50, clusters: int = 5) -> None:
        if cells < 1 or clusters < 1:
            raise UserError(f"W2PGNN cells={cells} and W2PGNN clusters={clusters} must be at least 1")
        require_numbers(cells**2 * clusters, cells=cells, clusters=clusters)
        self.basis, self.cells, self.clusters = basis, cells, clusters

    def fit(self, downstream: GraphCollection, **sources: GraphCollection) -> Feasibility:
        """Args: downstream: graphs of the task. sources: collections to pre-train on, by any names.

        Raises: UserError without a collection to pre-train on, or for one without graphs.
        """
        if not sources:
            raise UserError(
                "W2PGNN needs at least one collection to pre-train on, under a name of your choice in inputs"
            )
        down_RR = graphon(downstream, self.cells)
        own = {name: graphon(graphs, self.cells) for name, graphs in sources.items()}
        alone = {name: -gw_distance(values, down_RR) for name, values in own.items()}
        basis = own if self.basis == "domain" else self._joined(sources)
        stacked = np.stack([*basis.values()])
        alpha, apart = nearest_mixture(stacked, down_RR)
        return Feasibility(
            zeta=-apart,
            weights=dict(zip(basis, map(float, alpha), strict=True)),
            alone=alone,
            uniform=-gw_distance(stacked.mean(axis=0), down_RR),
        )

    def _joined(self, sources: Mapping[str, GraphCollection]) -> dict[str, np.ndarray]:
        together = tuple(graph for graphs in sources.values() for graph in graphs.graphs)
        if self.basis == "integrated":
            return {"all": graphon(GraphCollection(together), self.cells)}
        parts = clustered(together, self.clusters)
        return {f"kind {number}": graphon(part, self.cells) for number, part in enumerate(parts, 1)}
