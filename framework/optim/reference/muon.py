"""Muon, NorMuon, FactoredMuon and Dion2: whole matrices step along their orthogonalised momentum, or part of it."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightspan.optim.reference.loop import Group, Reference, State
from lightspan.optim.reference.newton_schulz import newton_schulz, shape_factor

Convention = Literal["adamw", "kj", "kimi", "dion", "none"]


class _Whole(Reference):
    """Takes every matrix, whatever its size."""

    def takes(self, w: Tensor, group: Group) -> bool:
        return w.ndim >= 2


class Muon(_Whole):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; with convention="kimi" that of Moonlight,
    arXiv 2502.16982, equation 4). `momentum` is mu.

        M <- mu M + (1 - mu) G
        O = newton_schulz(nu M + (1 - nu) G)      nu = mu with `nesterov`, 1 without
        W <- W - lr c O                           c by `convention`, see `shape_factor`

    The post has M <- mu M + G; the orthogonalisation makes no difference between the two. What is not projected gets
    AdamW with `other_lr`, betas and eps.

    With `by_heads`, the rows of each of a group's `heads` (their numbers, in order) are orthogonalised by themselves,
    and c is that of the shape of the largest; its share of the whole shape is in `shape_factor`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        by_heads: bool = False,
        convention: Convention = "kj",
        other_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "other_lr": other_lr}
        nu = momentum if nesterov else 1.0
        own = {"momentum": momentum, "nu": nu, "by_heads": by_heads, "convention": convention}
        super().__init__(params, **{**own, **common, **settings})

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        largest = max(self.rows(state, group)), state["shape"][1]
        return shape_factor(largest, group["convention"], state["shape"]) * self.orthogonal(g, state, group)

    def rows(self, state: State, group: Group) -> list[int]:
        """How many rows of the weight as given are orthogonalised together."""
        return group["heads"] if group["by_heads"] and "heads" in group else [state["shape"][0]]

    def orthogonal(self, g: Tensor, state: State, group: Group) -> Tensor:
        """O, which needs only its factor."""
        mu, nu = group["momentum"], group["nu"]
        state["momentum"] = mu * state.get("momentum", 0) + (1 - mu) * g
        across = 0 if state["shape"][0] >= state["shape"][1] else 1  # g is tall: rows of a wide weight are its columns
        parts = (nu * state["momentum"] + (1 - nu) * g).split(self.rows(state, group), dim=across)
        return torch.cat([newton_schulz(part) for part in parts], dim=across)


class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491, algorithm 1), with the published code's Nesterov momentum and norm.

        O, c as in Muon
        v <- beta2 v + (1 - beta2) mean(O^2)      one for each neuron, a row of the weight as given
        N = O / (sqrt(v) + 1e-10)
        W <- W - lr c N |O| / (|N| + 1e-10)

    The paper has 0.2 sqrt(out in) for c |O|.
    """

    def __init__(self, params: Iterable[Any], lr: float = 2e-2, beta2: float = 0.95, **settings: Any) -> None:
        super().__init__(params, lr, beta2=beta2, **settings)

    def orthogonal(self, g: Tensor, state: State, group: Group) -> Tensor:
        o, beta2 = super().orthogonal(g, state, group), group["beta2"]
        across = 1 if state["shape"][0] >= state["shape"][1] else 0  # g is tall: rows of a wide weight are its columns
        mean = (o**2).mean(dim=across, keepdim=True)
        state["neuron"] = beta2 * state.get("neuron", 0) + (1 - beta2) * mean
        n = o / (state["neuron"].sqrt() + 1e-10)
        return n * (o.norm() / (n.norm() + 1e-10))


class FactoredMuon(Muon):
    """Muon with a factored second moment, as Adafactor's (Shazeer & Stern 2018, arXiv 1804.04235, section 3) of O.

    O, c as in Muon, with its own `nu` (quasi-hyperbolic momentum: Ma & Yarats 2019, arXiv 1810.06801)
    v <- beta2 v + (1 - beta2) mean of O^2 over a row
    w <- beta2 w + (1 - beta2) mean of O^2 over a column
    N_ij = O_ij / ((sqrt(v_i) + 1e-10) (sqrt(w_j) + 1e-10)), cut off at -1 / mean(w) and 1 / mean(w)
    W <- W - lr c N |O| / (|N| + 1e-10)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        beta2: float = 0.95,
        nu: float = 0.6,
        by_heads: bool = True,
        convention: Convention = "adamw",
        other_lr: float | None = None,
        **settings: Any,
    ) -> None:
        own: dict[str, Any] = {"momentum": momentum, "nu": nu, "by_heads": by_heads, "convention": convention}
        super().__init__(params, lr, other_lr=lr if other_lr is None else other_lr, beta2=beta2, **own, **settings)

    def orthogonal(self, g: Tensor, state: State, group: Group) -> Tensor:
        o, beta2 = super().orthogonal(g, state, group), group["beta2"]
        n = o
        for axis, name in ((1, "row"), (0, "column")):
            state[name] = beta2 * state.get(name, 0) + (1 - beta2) * (o**2).mean(dim=axis, keepdim=True)
            n = n / (state[name].sqrt() + 1e-10)
        limit = 1 / state["column"].mean()
        n = n.clamp(-limit, limit)
        return n * (o.norm() / (n.norm() + 1e-10))


class Dion2(_Whole):
    """Dion2 (Ahn, Amsel & Langford 2025, arXiv 2512.16928). `fraction` is alpha, `momentum` mu.

        M <- M + G
        I = the ceil(alpha N) columns of M with the largest sums of absolute values
        W_I <- W_I - lr c newton_schulz(M_I)      c by `convention`, from the shape of the whole W
        M_I <- mu M_I

    Columns are those of the tall matrix, the shorter side of the weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        fraction: float = 0.25,
        momentum: float = 0.95,
        convention: Convention = "dion",
        other_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "other_lr": other_lr}
        super().__init__(params, fraction=fraction, momentum=momentum, convention=convention, **common)

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        m = g + state.get("momentum", 0)
        chosen = m.abs().sum(dim=0).topk(math.ceil(group["fraction"] * m.shape[1])).indices
        update = torch.zeros_like(m)
        update[:, chosen] = shape_factor(state["shape"], group["convention"]) * newton_schulz(m[:, chosen])
        m[:, chosen] *= group["momentum"]
        state["momentum"] = m
        return update
