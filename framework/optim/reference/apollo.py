"""APOLLO: the whole gradient, scaled as Adam scales a random projection of it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightspan.optim.reference.loop import Group, Reference, State, adam
from lightspan.optim.reference.rescaling import limited, row_scale


class APOLLO(Reference):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270, algorithm 1). `scale` is alpha, `limit` gamma of Fira's norm-growth
    limiter.

        Q = entries N(0, 1 / R)             step 1; not orthonormal, redrawn every `refresh` steps, moments stay
        R = G Q                             step 1
        R~ = Adam(R)                        step 2, (5)
        s_i = |R~_i| / |R_i|                step 3, (5): one per row
        W <- W - lr alpha limiter(s o G)    step 4; the limiter is (4)

    R~ is bias corrected, as in AdamW; equation 5 omits the correction. The limiter comes before alpha: with a
    constant alpha the order makes no difference. Draws come from the CPU and `seed`, and are not part of
    saved state.
    """

    tensor_wise = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rank: int = 256,
        refresh: int = 200,
        scale: float = 1.0,
        limit: float | None = 1.01,
        bound: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, refresh=refresh, scale=scale, limit=limit, bound=bound, **common)
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        rank = group["rank"]
        return torch.randn(a.shape[1], rank, generator=self.generator, dtype=a.dtype).to(a.device) / math.sqrt(rank)

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        q = self.frame(g, state, group)
        r = g @ q
        n = adam(r, state, group)
        above, below, outside = (x.norm() if self.tensor_wise else x.norm(dim=1, keepdim=True) for x in (n, r, g))
        return group["scale"] * limited(row_scale(above, below, outside, q, group["bound"]) * g, state, group["limit"])


class APOLLOMini(APOLLO):
    """APOLLO-Mini (arXiv 2412.05270, section 4, algorithm 1): rank 1, in step 3 one scale s = |R~| / |R| for the whole
    matrix, alpha = sqrt(128).
    """

    tensor_wise = True

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, rank: int = 1, scale: float = 128.0**0.5, **settings: Any
    ) -> None:
        super().__init__(params, lr, rank, scale=scale, **settings)
