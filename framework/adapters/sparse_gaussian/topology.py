"""Which weights are active moves while a network trains: coordinates with little signal leave, those with a steep loss
come.

Source: SSVI, ICLR 2024, arXiv 2402.11025, algorithm 1. n = floor(|S| alpha / 2 (1 + cos(pi t / T_end))) coordinates
leave, those with the lowest removal score; of all others the n with the largest |dL/dmu| come, those that have just
left among them, which then are as if they had stayed (as in the authors' code).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightspan.adapters.sparse_gaussian.layer import SparseGaussian
from lightspan.core.distributed import all_reduce_max, broadcast_first_rank, mean_over_ranks, world_size
from lightspan.core.ranges import require_in
from lightspan.subspaces.masks.index_sets import count_to_drop, drop_and_grow
from lightspan.subspaces.masks.maps import Selected
from lightspan.subspaces.sparse_gaussian.criteria import Criterion, SizeSNR


@dataclass(frozen=True)
class Topology:
    """When and by what coordinates move.

    Args:
        removal: what an active coordinate is worth.
        alpha: share of the active coordinates that move at first, falling to none by a cosine, in [0, 1]; at 0 the
            random start stays.
        every: optimiser steps between two updates, >= 1.
        until: share of the run after which nothing moves, in (0, 1].
    """

    removal: Criterion = field(default_factory=SizeSNR)
    alpha: float = 0.3
    every: int = 100
    until: float = 0.75

    def __post_init__(self) -> None:
        require_in("[0, 1]", alpha=self.alpha)
        require_in("[1, inf)", every=self.every)
        require_in("(0, 1]", until=self.until)

    def due(self, step: int, steps: float) -> bool:
        """Whether step number `step`, counted from 0, of a run of `steps` moves coordinates."""
        return self.alpha > 0 and step > 0 and step % self.every == 0 and step < self.until * steps

    def dropped(self, count: int, step: int, steps: float) -> int:
        """How many of `count` active coordinates move then."""
        return count_to_drop(count, self.alpha, step / (self.until * steps))


@torch.no_grad()
def move(layers: Mapping[str, SparseGaussian], dropped: Mapping[str, int], removal: Criterion) -> dict[str, Tensor]:
    """Moves coordinates of layers that were watched in a backward pass, and stops watching them.

    All ranks must call it, with their own gradients, whose mean decides; the first rank's choice is everyone's. A layer
    that got no gradient on some rank, or one that is not finite, keeps its coordinates.

    Args:
        dropped: how many leave, by layer.
    Returns: where each coordinate was before, see `SparseGaussian.move`, by the layers that moved.
    """
    gradients = {name: layer.gradient_S for name, layer in layers.items()}
    for layer in layers.values():
        layer.watching, layer.gradient_S = False, None
    lacks = {name: g is None or not bool(g.isfinite().all()) for name, g in gradients.items()}
    device = next(iter(layers.values())).mu.device if layers else torch.device("cpu")
    lacking = all_reduce_max(torch.tensor([float(value) for value in lacks.values()], device=device)).tolist()
    found = {name: g for (name, g), lack in zip(gradients.items(), lacking, strict=True) if g is not None and not lack}
    if world_size() > 1:
        mean_over_ranks([*found.values()])
    opened = {name: _next(layers[name], g, dropped[name], removal) for name, g in found.items()}
    if world_size() > 1:
        broadcast_first_rank([*opened.values()])
    return {name: layers[name].move(open_S.flatten().nonzero().flatten()) for name, open_S in opened.items()}


def _next(layer: SparseGaussian, gradient_S: Tensor, dropped: int, removal: Criterion) -> Tensor:
    """The next active coordinates, bool."""
    subspace: Selected = layer.subspace
    score_k = removal.of(layer.mu, layer.std)
    open_S = subspace.push(torch.ones_like(score_k)) > 0
    return drop_and_grow(open_S, subspace.push(score_k), gradient_S.abs(), dropped, len(score_k))
