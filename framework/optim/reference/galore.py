"""GaLore: Adam in the span of the gradient's top singular vectors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightspan.optim.reference.loop import Group, Reference, State, adam


def top_singular_vectors(g: Tensor, rank: int) -> Tensor:
    """Right singular vectors [N R] of the largest singular values."""
    return torch.linalg.svd(g, full_matrices=False).Vh[:rank].T


class GaLore(Reference):
    """GaLore with Adam (Zhao et al. 2024, arXiv 2403.03507, algorithm 2, whose lines have no numbers). `scale` is
    alpha; `refresh` is T, the code's update_proj_gap; Q^T is the code's projector.

        Q = top right singular vectors of G,         (12), (13); chosen again every `refresh` steps, section 4.1
        R = G Q                                      section 4.2: one of P and Q, here that of tall matrices
        N = Adam(R)                                  (15); bias correction counts all steps, moments stay when Q changes
        W <- W - lr alpha N Q^T                      (10); alpha in algorithm 2 only
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 128,
        refresh: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, refresh=refresh, scale=scale, **common)

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        return top_singular_vectors(a, group["rank"])

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        q = self.frame(g, state, group)
        n = adam(g @ q, state, group)
        return group["scale"] * n @ q.T
