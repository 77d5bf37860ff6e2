"""LDAdam: a new frame in every step, moments that turn with it, and error feedback."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightspan.optim.reference.galore import top_singular_vectors
from lightspan.optim.reference.loop import Group, Reference, State, adam

Betas = tuple[float, float]


def rotated_moments(
    m: Tensor, v: Tensor, overlap: Tensor, t: int, betas: Betas, reach: bool = False
) -> tuple[Tensor, Tensor]:
    """LDAdam's projection-aware moments after t >= 1 steps (arXiv 2410.16103, section 3), for overlap = Q_old^T Q_new
    [R R]: the mean is rotated, the variance v_hat - m_hat^2 by the squares (coordinates count as uncorrelated), and
    |.| corrects a negative result.

    Args:
        reach: not in the paper: whether v stays so large that m / sqrt(v) is no more than Adam's can be, by
            Cauchy-Schwarz.
    """
    beta1, beta2 = betas
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    v = ((v_hat - m_hat**2) @ overlap**2 + (m_hat @ overlap) ** 2).abs()
    if reach:
        v = torch.maximum(v, (m_hat @ overlap) ** 2 * (1 - beta2) * (1 - beta1**2 / beta2) / (1 - beta1) ** 2)
    return m @ overlap, (1 - beta2**t) * v


def power_step(a: Tensor, frame: Tensor, m_hat: Tensor, rho: float) -> Tensor:
    """One block power iteration from the previous frame, QR(B^T B Q) on B = rho m_hat Q^T + (1 - rho) A."""
    b = rho * m_hat @ frame.T + (1 - rho) * a
    return torch.linalg.qr(b.T @ (b @ frame)).Q


class LDAdam(Reference):
    """LDAdam (Robert et al. 2024, arXiv 2410.16103, algorithm 1; its lines are not cited one by one).

        A = G + E
        Q = power_step(A), in the first step the top singular vectors of A
        m', v' = rotated_moments of the previous step
        R = A Q
        E <- A - R Q^T + b1 / (1 - b1) (m_{t-1} Q_{t-1}^T - m' Q^T)
        W <- W - lr N Q^T            N = Adam(R) from m', v'

    The last term of E restores what the rotation removed from the momentum; b1 / (1 - b1) is the sum of the weights
    with which that part would still have entered later steps.

    Args:
        reach: see `rotated_moments`; the engine does so. False is as published.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        betas: Betas = (0.908, 0.99),
        rho: float = 0.908,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        reach: bool = False,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, rho=rho, reach=reach, **common)

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        if "q" not in state:
            return top_singular_vectors(a, group["rank"])
        m_hat = state["m"] / (1 - group["betas"][0] ** (state["t"] - 1))
        return power_step(a, state["q"], m_hat, group["rho"])

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        beta1, old, lost = group["betas"][0], state.get("q"), 0
        a = g + state.get("error", 0)
        q = self.frame(a, state, group)
        if old is not None:
            lifted = state["m"] @ old.T
            m, v, t = state["m"], state["v"], state["t"] - 1
            state["m"], state["v"] = rotated_moments(m, v, old.T @ q, t, group["betas"], group["reach"])
            lost = lifted - state["m"] @ q.T
        r = a @ q
        state["error"] = a - r @ q.T + beta1 / (1 - beta1) * lost
        return adam(r, state, group) @ q.T
