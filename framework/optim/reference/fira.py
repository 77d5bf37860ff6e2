"""Fira: GaLore, plus the gradient outside the frame at the scale that Adam has inside it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightspan.optim.reference.galore import top_singular_vectors
from lightspan.optim.reference.loop import Group, Reference, State, adam
from lightspan.optim.reference.rescaling import limited, row_scale


class FiraAdam(Reference):
    """Fira with Adam (Chen et al. 2024, arXiv 2410.01623, algorithm 1 in appendix A.1, whose lines have no numbers).
    `scale` is alpha, `limit` gamma of the norm-growth limiter.

        Q, R, N as in GaLore             (6), (7)
        phi_i = |N_i| / |R_i|            (9) by rows, as in (11): the paper's columns, for its wide matrices
        S = limiter(phi o (G - R Q^T))   (12), section 4.2
        W <- W - lr alpha (N Q^T + S)    (10)

    Algorithm 1 has epsilon outside the bias correction of N; here it is Adam's, as in the published code. With
    scale_residual=False, as in that code, alpha multiplies only N Q^T and R Q^T.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 128,
        refresh: int = 200,
        scale: float = 0.25,
        limit: float | None = 1.01,
        bound: float | None = None,
        scale_residual: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"scale": scale, "limit": limit, "bound": bound, "scale_residual": scale_residual}
        super().__init__(params, refresh=refresh, **own, **common)

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        return top_singular_vectors(a, group["rank"])

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        outer, inner = (group["scale"], 1.0) if group["scale_residual"] else (1.0, group["scale"])
        q = self.frame(g, state, group)
        r = g @ q
        n = adam(r, state, group)
        rest = g - inner * r @ q.T
        phi = row_scale(n.norm(dim=1), r.norm(dim=1), rest.norm(dim=1), q, group["bound"])
        s = limited(phi[:, None] * rest, state, group["limit"])
        return outer * (inner * n @ q.T + s)
