"""What every reference shares: the loop over parameters, Adam, and when a frame is chosen again.

Shapes: M rows (longer side), N columns (shorter side), R rank.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.optim.matrices.limits import require_valid
from lightspan.optim.matrices.loading import load_between_hooks, numbered

State = dict[str, Any]
Group = dict[str, Any]


def tall(matrix: Tensor) -> Tensor:
    """In float64, as a matrix with the longer side as rows; axes after the first are flattened, as in convolutions."""
    matrix = matrix.detach().double().flatten(1)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def as_given(result: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `tall`, for a result of the shape of `weight`."""
    wide = weight.flatten(1).shape[0] < weight.flatten(1).shape[1]
    return (result.T if wide else result).reshape(weight.shape)


def adam(g: Tensor, state: State, group: Group) -> Tensor:
    """The direction of Kingma & Ba 2015, algorithm 1; moments m and v are kept in `state`."""
    t, (beta1, beta2) = state["t"], group["betas"]
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    m_hat, v_hat = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
    return m_hat / (v_hat.sqrt() + group["eps"])


class Reference(Optimizer):
    """A published optimiser in float64: `update` for what it `takes`, matrices whose shorter side is not below `rank`,
    AdamW for the rest, both after decoupled weight decay. A rank equal to the shorter side rotates the matrix and drops
    nothing (the engine leaves such a matrix to AdamW).

    For one process and unsharded parameters. State is whatever the equations name. All matrices change their frames
    in the same step, the first and every `refresh`-th after it.

    Args:
        settings: those of the groups: lr, rank, betas, eps, weight_decay, and what the optimiser itself takes.
            `other_lr`, if there is one, is the rate of what is not projected.
    Attributes:
        frames: frames [N R] by step, used instead of those of `choose`: for comparisons in which signs of singular
            vectors or random draws differ. Only useful for a single matrix.
    Raises: UserError for settings out of range.
    """

    frames: Sequence[Tensor] | None = None

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        require_valid(type(self).__name__, settings)
        super().__init__(params, settings)

    def update(self, g: Tensor, state: State, group: Group) -> Tensor:
        """What is subtracted, times lr, from a tall matrix of gradient `g`.

        Args:
            state: t, the step, and shape, (out, in) of the matrix as given; an optimiser adds whatever else it keeps.
        """
        raise NotImplementedError

    def takes(self, w: Tensor, group: Group) -> bool:
        """Whether `update` steps this parameter."""
        return w.ndim >= 2 and group["rank"] <= min(w.flatten(1).shape)

    def choose(self, a: Tensor, state: State, group: Group) -> Tensor:
        """A new frame [N R] from what is projected."""
        raise NotImplementedError

    def frame(self, a: Tensor, state: State, group: Group) -> Tensor:
        """This step's frame, which `state` keeps as q."""
        if self.frames is not None:
            state["q"] = self.frames[state["t"] - 1].double()
        elif (state["t"] - 1) % group.get("refresh", 1) == 0:
            state["q"] = self.choose(a, state, group)
        return state["q"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for w in (parameter for parameter in group["params"] if parameter.grad is not None):
                state, lr = self.state[w], group["lr"]
                state["t"] = state.get("t", 0) + 1
                if self.takes(w, group):
                    state["shape"] = tuple(w.flatten(1).shape)
                    update = as_given(self.update(tall(w.grad), state, group), w)
                else:
                    lr, update = group.get("other_lr", lr), adam(w.grad.double(), state, group)
                w.copy_((1 - lr * group["weight_decay"]) * w.double() - lr * update)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but state stays in float64: torch casts it to the dtype of the parameters.

        Raises: UserError for state of other groups; nothing is changed then.
        """
        load_between_hooks(self, state_dict, self._prepared, self._restore)

    def _prepared(self, given: dict[str, Any]) -> dict[str, Any]:
        numbered(self, given)
        return given

    def _restore(self, given: dict[str, Any]) -> None:
        for w, _, number in numbered(self, given):
            for key, value in given["state"].get(number, {}).items():
                kept = value.to(w.device, torch.float64, copy=True) if isinstance(value, Tensor) else value
                self.state[w][key] = kept


class ReferenceRun(NamedTuple):
    """A reference on one weight. Lists have one entry per step, in the tall orientation.

    weight: the last one. frames: q [N R], empty without frames. moments: (m, v) [M R], empty without Adam. buffers: the
    full-size state after the step, which is the error [M N] of error feedback or a momentum [M N]; empty if there is
    none.
    """

    weight: Tensor
    frames: list[Tensor]
    moments: list[tuple[Tensor, Tensor]]
    buffers: list[Tensor]


def run(
    kind: Callable[..., Reference],
    weight: Tensor,
    gradients: Sequence[Tensor],
    lr: float | Sequence[float],
    frames: Sequence[Tensor] | None = None,
    **settings: Any,
) -> ReferenceRun:
    """Takes one step per gradient from `weight`, which is not changed.

    Args:
        lr: one rate, or one per step.
        frames: those of every step, as in `Reference.frames`; their rank is then the rank.
    """
    w = nn.Parameter(weight.detach().double().clone())
    if frames is not None:
        settings["rank"] = frames[0].shape[1] if frames else 1
    optimizer = kind([w], **settings)
    optimizer.frames = frames
    state, result = optimizer.state[w], ReferenceRun(w, [], [], [])
    rates = [lr] * len(gradients) if isinstance(lr, float | int) else lr
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = gradient.double()
        optimizer.step()
        result.frames.extend([state["q"]] if "q" in state else [])
        result.moments.extend([(state["m"], state["v"])] if "m" in state else [])
        result.buffers.extend(state[key] for key in ("error", "momentum") if key in state)
    return result._replace(weight=w.detach())
