"""LARS: momentum SGD in which each weight matrix moves by a share of its own length, for batches of thousands.

Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888, algorithm 1, as
SimCLR (2002.05709) uses it: the gradient's length is taken with the decay in it, where the paper adds both lengths, and
biases and norms take plain steps.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.devices import wide, wide_type, widest_float
from lightspan.core.errors import UserError
from lightspan.core.sharded import Ranks, local, ranks_of
from lightspan.optim.matrices.loading import load_between_hooks, numbered, require_same_kind, with_own_groups

VELOCITY = "momentum_buffer"
"""As torch.optim.SGD calls it."""


class LARS(Optimizer):
    """v <- momentum v + lr r u, w <- w - v, with u = g + weight_decay w and r = trust |w| / |u|.

    r is 1 for parameters with fewer than two axes (biases, norms, scalars), and where |w| or |u| is 0. These also go
    without decay if the groups come from `lightspan.optim.groups`, as those of every `Method` do; of a plain list of
    parameters all are decayed. Lengths are those of whole parameters, also of sharded ones (FSDP2).

    v is held in float32 or wider. Weights in half precision are rounded to nearest, which loses small steps.

    Args:
        lr: >= 0; SimCLR has 0.3 for each 256 images of the batch.
        momentum: in [0, 1).
        weight_decay: >= 0.
        trust: eta, > 0, the share of its own length that a matrix moves in a step at lr 1.
    Raises: UserError for a setting out of range, in a group too, and for sparse gradients.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        for name, most in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf), ("trust", math.inf)):
            if not 0 <= group[name] < most:
                raise UserError(f"LARS {name}={group[name]} must be in [0, {'infinity' if most > 1 else '1'})")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but the velocity keeps its own precision. Raises: UserError for another optimiser's state."""
        load_between_hooks(self, state_dict, self._prepared, self._restore)

    def _prepared(self, given: dict[str, Any]) -> dict[str, Any]:
        whole = with_own_groups(self, given)
        for p, _, number in numbered(self, whole):
            if held := whole["state"].get(number):
                require_same_kind("", held, {VELOCITY: p})
        return whole

    def _restore(self, given: dict[str, Any]) -> None:
        for p, _, number in numbered(self, given):
            if held := given["state"].get(number):
                velocity = held[VELOCITY].to(device=p.device, dtype=wide_type(p.dtype), copy=True)
                self.state[p] = {VELOCITY: velocity}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
            raise UserError("LARS takes no sparse gradients; set sparse=False in the embedding")
        weights = [wide(local(p)) for p in parameters]
        updates = [wide(local(p.grad)) for p in parameters if p.grad is not None]
        updates = list(torch._foreach_add(updates, weights, alpha=group["weight_decay"]))
        adapted = [i for i, p in enumerate(parameters) if p.ndim > 1]
        ratios = _trust_ratios([parameters[i] for i in adapted], [weights[i] for i in adapted],
                               [updates[i] for i in adapted], group["trust"])  # fmt: skip
        for i, ratio in zip(adapted, ratios, strict=True):
            updates[i].mul_(ratio.to(updates[i].dtype))
        for p in parameters:
            if not self.state[p]:
                self.state[p][VELOCITY] = torch.zeros_like(p, dtype=wide_type(p.dtype))
        moved = [local(self.state[p][VELOCITY]) for p in parameters]
        torch._foreach_mul_(moved, group["momentum"])
        torch._foreach_add_(moved, updates, alpha=group["lr"])
        torch._foreach_sub_(weights, moved)
        for p, weight in zip(parameters, weights, strict=True):
            if weight is not local(p):
                local(p).copy_(weight)


def _trust_ratios(parameters: list[Tensor], weights: list[Tensor], updates: list[Tensor], trust: float) -> list[Tensor]:
    """r of each parameter, 0-d, from the parts that this rank has; one collective for all that are split alike."""
    alike: dict[Ranks | None, list[int]] = defaultdict(list)
    for i, p in enumerate(parameters):
        alike[ranks_of(p)].append(i)
    ratios: dict[int, Tensor] = {}
    for ranks, members in alike.items():
        held = [tensors[i] for tensors in (weights, updates) for i in members]
        # In float32 the squares of numbers below 1e-23 are 0, and a ratio of 1 would be a leap there.
        norms = torch._foreach_norm(held, 2, dtype=widest_float(held[0].device))
        squares_2T = torch.stack(list(norms)).square().view(2, -1)
        own_T, given_T = (squares_2T if ranks is None else ranks.total(squares_2T)).sqrt()
        ratio_T = torch.where((own_T > 0) & (given_T > 0), trust * own_T / given_T, 1.0)
        ratios |= dict(zip(members, ratio_T.unbind(), strict=True))
    return [ratios[i] for i in range(len(parameters))]
