"""`LowRank`: Adam whose moments live in a low-dimensional subspace of each matrix; everything else gets plain AdamW."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightspan.errors import UserError
from lightspan.optim.bases import Basis, PowerBasis
from lightspan.optim.core import LowRankState, initial_state, low_rank_step, refresh
from lightspan.optim.groups import matches
from lightspan.optim.residuals import Fira


def canonical(tensor: Tensor) -> Tensor:
    """A view [M N] with M >= N: trailing axes flattened (a convolution is out x in*k*k), transposed when wide."""
    matrix = tensor.flatten(1)
    return matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix


@dataclass
class _Bucket:
    """Projected parameters of one group and one shape; their stacked state is what `Optimizer.state` shows in views."""

    group: dict[str, Any]
    parameters: list[Tensor]
    phases: list[int]
    state: LowRankState
    views: list[dict[str, Tensor]]


class LowRank(Optimizer):
    """Decoupled-weight-decay Adam with moments in a subspace of each matrix. State per M x N matrix (N <= M): 2 M R + N
    R numbers.

    A parameter is projected if its group allows it (key `project`: a bool, default True, or a list of name patterns),
    it has two or more axes, and `rank` is below its shorter side; the longer side is kept. All others get torch's
    AdamW, in the same step. With the defaults this is Fira (arXiv 2410.01623) on a tracked instead of a recomputed SVD
    basis; `residual=None` gives GaLore's update (arXiv 2403.03507).

    Args:
        params: parameters, named parameters, or groups of either; `lightspan.optim.groups` makes good groups.
        lr: step size, >= 0. Coordinates are normalised as Adam normalises, so rates are those of AdamW, a little
            larger.
        rank: dimension of the subspace, >= 1. State shrinks in proportion to rank / shorter side.
        basis: how frames are chosen; None means `PowerBasis()`.
        residual: what happens to the gradient outside the frame; None drops it.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        refresh: optimiser steps between two choices of a matrix' frame, >= 1. Refreshes are staggered over the
            matrices, so that no single step pays for all of them; the first step has to.
        seed: of the frames that tracking starts from.
    Raises: UserError for values out of range, and if `rank` is below the shorter side of no parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 64,
        basis: Basis | None = None,
        residual: Fira | None = Fira(),  # noqa: B008 - frozen
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 50,
        seed: int = 0,
    ) -> None:
        for name, value, sound, limit in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("rank", rank, rank >= 1, "at least 1"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
            ("eps", eps, eps >= 0, "at least 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("refresh", refresh, refresh >= 1, "at least 1"),
        ):
            if not sound:
                raise UserError(f"LowRank {name}={value} must be {limit}")
        self.basis = basis or PowerBasis()
        self.residual = residual
        self.seed = seed
        self._names: dict[Tensor, str] = {}
        self._buckets: list[_Bucket] | None = None
        defaults = {"lr": lr, "rank": rank, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "refresh": refresh, "project": True})
        self._require_one_projected()

    def _require_one_projected(self) -> None:
        candidates = [
            (min(canonical(p).shape), g)
            for g in self.param_groups
            for p in g["params"]
            if self.allowed(p, g) and p.ndim > 1
        ]
        if not candidates:
            raise UserError(
                "LowRank got no matrix to project: pass parameters with two or more axes in a group with project=True"
            )
        side, group = max(candidates, key=lambda candidate: candidate[0])
        if not any(group["rank"] < side for side, group in candidates):
            raise UserError(
                f"rank={group['rank']} is not below the shorter side of any matrix (the largest is {side}), so nothing "
                f"would be projected; choose a rank of at most {max(side // 2, 1)}, or use AdamW"
            )

    def allowed(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the group's `project` lets this parameter be projected, its shape aside."""
        project = group["project"]
        return project if isinstance(project, bool) else matches(self._names.get(parameter, ""), project)

    def projected(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether this parameter's moments live in a subspace."""
        return self.allowed(parameter, group) and parameter.ndim > 1 and group["rank"] < min(canonical(parameter).shape)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._names.update(zip(group["params"], group.get("param_names", []), strict=False))
        self._buckets = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buckets": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its own dtype: torch casts state to the parameter's, which would turn
        column indices into floats and float32 moments of bfloat16 weights into bfloat16."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][key] = value.to(device=self.state[parameter][key].device, copy=True)
        self._buckets = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket in self._current_buckets():
            self._step_projected(bucket)
        for group in self.param_groups:
            self._step_elementwise(group)
        return loss

    def _current_buckets(self) -> list[_Bucket]:
        """Stacks are rebuilt whenever someone, a checkpoint or a device move, replaced the state they are viewed
        through.
        """
        if self._buckets is None or any(
            self.state[p] is not view
            for bucket in self._buckets
            for p, view in zip(bucket.parameters, bucket.views, strict=True)
        ):
            self._buckets = self._build_buckets()
        return self._buckets

    def _build_buckets(self) -> list[_Bucket]:
        members: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        every = [(p, g) for g in self.param_groups for p in g["params"] if self.projected(p, g)]
        groups = {id(group): group for group in self.param_groups}
        for order, (parameter, group) in enumerate(every):
            phase = order * group["refresh"] // len(every)
            wide = parameter.flatten(1).shape[0] < parameter.flatten(1).shape[1]
            key = (id(group), *canonical(parameter).shape, wide, parameter.dtype, parameter.device)
            members[key].append((parameter, phase))
        return [
            self._build_bucket(groups[key[0]], pairs, self.seed + number)
            for number, (key, pairs) in enumerate(members.items())
        ]

    def _build_bucket(self, group: dict[str, Any], pairs: list[tuple[Tensor, int]], seed: int) -> _Bucket:
        parameters, phases = [p for p, _ in pairs], [phase for _, phase in pairs]
        first = parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        rows, size = canonical(first).shape
        state = initial_state(len(pairs), rows, size, group["rank"], self.basis, seed, dtype=dtype, device=first.device)
        views = []
        for i, parameter in enumerate(parameters):
            view = {key: stack[i] for key, stack in state.tensors().items()}
            view["step"] = torch.tensor(0.0)
            for key, value in self.state[parameter].items():
                view[key].copy_(value)
            self.state[parameter] = view
            views.append(view)
        return _Bucket(group, parameters, phases, state, views)

    def _step_projected(self, bucket: _Bucket) -> None:
        active = [i for i, p in enumerate(bucket.parameters) if p.grad is not None]
        if not active:
            return
        group, dtype = bucket.group, bucket.state.limiter_B.dtype
        everyone = len(active) == len(bucket.parameters)
        index = None if everyone else torch.tensor(active, device=bucket.state.limiter_B.device)
        state = bucket.state if index is None else bucket.state.part(index)
        weights = [canonical(bucket.parameters[i]) for i in active]
        gradients = [canonical(bucket.parameters[i].grad).to(dtype) for i in active]  # type: ignore[arg-type]
        first, due = [], []
        for position, i in enumerate(active):
            step = bucket.views[i]["step"].add_(1)  # a CPU scalar: reading it asks no device
            done = int(step) - 1
            if done == 0:
                first.append(position)
            elif (done - bucket.phases[i]) % group["refresh"] == 0:
                due.append(position)
        for positions, is_first in ((first, True), (due, False)):
            if positions:
                refresh(gradients, state, positions, self.basis, group["betas"], first=is_first)
        low_rank_step(
            weights,
            gradients,
            state,
            basis=self.basis,
            residual=self.residual,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        if index is not None:
            bucket.state.write_part(index, state)

    def _step_elementwise(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None and not self.projected(p, group)]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros(
                        (), dtype=torch.float32, device=parameter.device
                    ),  # the fused step reads it on the device
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
