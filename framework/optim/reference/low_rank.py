"""What `lightspan.optim.low_rank.optimizer.LowRank` does with its defaults: Fira on a tracked frame."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightspan.optim.reference.galore import top_singular_vectors
from lightspan.optim.reference.loop import Group, Reference, State, adam
from lightspan.optim.reference.rescaling import limited, row_scale


def moments_with_floor(m: Tensor, v: Tensor, r: Tensor, overlap: Tensor, t: int, betas: tuple[float, float]) -> Any:
    """Moments m and v after t >= 1 steps, for overlap = Q_old^T Q_new [R R]: LDAdam's (arXiv 2410.16103, section 3)
    except for variances below zero, which count as zero, and for what the old frame did not capture: a new direction
    has a share of the old ones below 1, and for the rest only the present coordinates r are known, squared.
    """
    beta1, beta2 = betas
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    unknown = (1 - (overlap**2).sum(dim=0)).clamp_min(0)
    v_hat = (v_hat - m_hat**2).clamp_min(0) @ overlap**2 + (m_hat @ overlap) ** 2 + unknown * r**2
    return m @ overlap, (1 - beta2**t) * v_hat


class LowRank(Reference):
    """Not published; what this project recommends.

        Q = QR(G^T G Q) every `refresh` steps, one power step from the previous frame
        R = G Q
        m, v <- moments_with_floor when the frame changes
        N, S as in Fira, with `bound`
        W <- W - lr scale (N Q^T + S)

    The first frame is the top singular vectors of G; the engine takes three power steps from a random one.
    `convention` "adamw" multiplies the update by sqrt(max(1, N / 12)).
    residual=False drops S, as the engine's residual=None does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 64,
        refresh: int = 50,
        scale: float = 1.0,
        limit: float | None = 1.01,
        bound: float | None = 4.0,
        residual: bool = True,
        convention: str = "none",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"scale": scale, "limit": limit, "bound": bound, "residual": residual, "convention": convention}
        super().__init__(params, refresh=refresh, **own, **common)

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        if "q" not in state:
            return top_singular_vectors(a, group["rank"])
        return torch.linalg.qr(a.T @ (a @ state["q"])).Q

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        old = state.get("q")
        q = self.frame(g, state, group)
        r = g @ q
        if old is not None and not torch.equal(old, q):
            m, v, t = state["m"], state["v"], state["t"] - 1
            state["m"], state["v"] = moments_with_floor(m, v, r, old.T @ q, t, group["betas"])
        n = adam(r, state, group)
        update = n @ q.T
        if group["residual"]:
            rest = g - r @ q.T
            scale = row_scale(n.norm(dim=1), r.norm(dim=1), rest.norm(dim=1), q, group["bound"])
            update = update + limited(scale[:, None] * rest, state, group["limit"])
        length = math.sqrt(max(1.0, g.shape[1] / 12)) if group["convention"] == "adamw" else 1.0
        return group["scale"] * length * update
