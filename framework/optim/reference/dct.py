"""DCT-AdamW and Trion: frames are columns of one fixed orthonormal basis, chosen by what they capture."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightspan.optim.reference.loop import Group, Reference, State, adam
from lightspan.optim.reference.newton_schulz import newton_schulz, shape_factor


def dct_basis(size: int) -> Tensor:
    """Orthonormal DCT-II basis [N N]: column k is sqrt(2 / N) cos(pi k (2 j + 1) / (2 N)), the first by sqrt(1 / 2)."""
    j, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    basis = (2 / size) ** 0.5 * torch.cos(torch.pi * (k * (2 * j + 1)).double() / (2 * size))
    basis[:, 0] *= 0.5**0.5
    return basis


def selected(a: Tensor, basis: Tensor, rank: int, norm: int) -> Tensor:
    """Indices, ascending, of the `rank` columns of the basis with the largest l1 or l2 norm of A D (dynamic column
    selection, arXiv 2505.17967, section 3).
    """
    return (a @ basis).norm(p=norm, dim=0).topk(rank).indices.sort().values


class _Columns(Reference):
    """Frames that are columns D_I of a basis."""

    basis: Callable[[int], Tensor]

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        basis = self.basis(a.shape[1]).to(a)
        return basis[:, selected(a, basis, group["rank"], group["norm"])]


class DCTAdamW(_Columns):
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967, algorithm 2; its lines are not cited one by one).

        A = G + E
        every `refresh` steps: I = `selected` columns of D, T = Q_old^T Q with Q = D_I, m <- m T, v <- |v T|
        R = A Q
        E <- A - R Q^T
        W <- W - lr N Q^T            N = Adam(R), with the bias correction of all steps

    The paper refreshes in its first and every T_u-th step, counted from 1; here, as in the engine, in the first and
    every T_u-th after it. The published code's defaults differ: norm=1, no rotation, no error feedback, and
    (sim_type="matmul") columns of the DCT-III matrix, basis=lambda n: dct_basis(n).T; ours are those of its "makhoul".

    Args:
        error_feedback: whether there is an E; not quantised here.
        basis: makes D [N N] for a size.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        refresh: int = 1,
        error_feedback: bool = True,
        rotate: bool = True,
        norm: Literal[1, 2] = 2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        basis: Callable[[int], Tensor] = dct_basis,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"refresh": refresh, "error_feedback": error_feedback, "rotate": rotate, "norm": norm}
        super().__init__(params, **own, **common)
        self.basis = basis

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        old = state.get("q")
        a = g + state.get("error", 0)
        q = self.frame(a, state, group)
        r = a @ q
        if group["error_feedback"]:
            state["error"] = a - r @ q.T
        if group["rotate"] and old is not None and old is not q:
            overlap = old.T @ q
            state["m"], state["v"] = state["m"] @ overlap, (state["v"] @ overlap).abs()
        return adam(r, state, group) @ q.T


class Trion(_Columns):
    """Trion (arXiv 2505.17967, algorithm 1; its lines are not cited one by one): Dion with selected columns for its
    power iteration. `momentum` is mu.

        B = M + G
        I = `selected` columns of D, Q = D_I, chosen again in every step
        R = B Q
        M <- B - (1 - mu) R Q^T      what is not captured stays complete
        W <- W - lr c newton_schulz(R) Q^T      c by `convention`, see `shape_factor`

    What is not projected gets AdamW with `other_lr`, betas and eps, as in the published code.

    Args:
        basis: makes D [N N] for a size.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        rank: int = 128,
        momentum: float = 0.95,
        norm: Literal[1, 2] = 2,
        convention: Literal["adamw", "kj", "kimi", "dion", "none"] = "kj",
        other_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        basis: Callable[[int], Tensor] = dct_basis,
    ) -> None:
        common = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"momentum": momentum, "norm": norm, "convention": convention, "other_lr": other_lr}
        super().__init__(params, **own, **common)
        self.basis = basis

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        b = g + state.get("momentum", 0)
        q = self.frame(b, state, group)
        r = b @ q
        state["momentum"] = b - (1 - group["momentum"]) * r @ q.T
        return shape_factor(state["shape"], group["convention"]) * newton_schulz(r) @ q.T
