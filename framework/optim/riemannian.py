"""`RiemannianSGD`: frames move on the Grassmann manifold, all other parameters by another optimiser, in one step.

Source of the step: Wang et al., "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation", ICCV 2023, arXiv 2308.01547, algorithm 1. Shapes: B frames, N ambient width, R dimension.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.devices import has_values
from lightspan.core.errors import UserError
from lightspan.core.sharded import local, ranks_of, split_axis, total_over
from lightspan.optim.matrices.loading import with_own_groups
from lightspan.optim.random_subspace import OptimizerCallable
from lightspan.subspaces.grassmann import Horizontal, geodesic, orthonormalised


class RiemannianSGD(Optimizer):
    """A frame S with a gradient D, [N R] or B of them [B N R], moves by

        M <- H(momentum M + D)     H(X) = X - S S^T X, which makes the gradient a tangent and carries the momentum along
        S <- the frame at -lr M    along the geodesic, or by the QR decomposition of S - lr M

    and is orthonormalised every few steps, by a QR decomposition with fixed signs. The paper keeps M in the ambient
    space and projects a copy; the published code counts steps for all optimisers together and lets QR turn columns
    round, which turns their momentum: here each frame counts its own steps, and signs are fixed.

    A frame without a gradient stays where it is; one with a gradient of zero follows its momentum. Frames do not decay.
    Frames that FSDP2 shards over their first axis step where they are.

    Args:
        params: groups with `frames: True` are frames, as those of `lightspan.optim.groups` whose kind is "frames"; the
            others are for `rest`. Parameters without groups are frames.
        lr: of frames, >= 0: a step turns the subspace by lr times the singular values of M, in radians.
        momentum: in [0, 1).
        rest: makes the optimiser of the other parameters, one that keeps its state as torch.optim's do.
        retraction: how a step comes back to the manifold.
        orthonormalise_every: steps along geodesics between two QR decompositions of a frame, >= 1.
    Raises: UserError for settings out of range, no frame among the parameters, frames in half precision, wider than
        long or split over ranks along another axis than the first of three, a `rest` that is missing or keeps its state
        in a form of its own, and in `step` for a gradient of a frame that is not finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        rest: OptimizerCallable | None = None,
        retraction: Literal["geodesic", "qr"] = "geodesic",
        orthonormalise_every: int = 5,
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1 or orthonormalise_every < 1:
            raise UserError(
                f"RiemannianSGD lr={lr} must be at least 0, momentum={momentum} in [0, 1) and "
                f"orthonormalise_every={orthonormalise_every} at least 1"
            )
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given, "frames": True}]
        frames, others = [g for g in groups if g.get("frames")], [g for g in groups if not g.get("frames")]
        if not frames:
            raise UserError("RiemannianSGD got no frames; without a head such as GrassmannHead use `rest` by itself")
        if others and rest is None:
            raise UserError("RiemannianSGD moves frames alone; name the optimiser of the other parameters as `rest`")
        self.rest: Optimizer | None = None
        own = {"lr": lr, "momentum": momentum, "retraction": retraction, "orthonormalise_every": orthonormalise_every}
        super().__init__(frames, own)
        if others and rest is not None:
            self.rest = rest(others)
            if type(self.rest).load_state_dict is not Optimizer.load_state_dict:
                raise UserError(
                    f"RiemannianSGD cannot keep the state of {type(self.rest).__name__}, which has a form of its own; "
                    "take an optimiser of torch.optim as `rest`"
                )
            # The order of the given groups, by which a saved state is assigned.
            by_first = {id(_first(group)): group for group in (*self.rest.param_groups, *self.param_groups)}
            self.param_groups = [by_first[id(_first(group))] for group in groups]
            self._share()
            for group in self.param_groups:
                group["rule"] = {"rest": type(self.rest).__name__}

    def _share(self) -> None:
        """One state and one set of groups for both: schedules, clipping and checkpoints see a single optimiser."""
        if self.rest is not None:
            self.rest.state = self.state
            self.rest.param_groups = [group for group in self.param_groups if not group.get("frames")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises: UserError for frames that are half precision, wider than long, or not whole on their rank."""
        if self.rest is not None and not param_group.get("frames"):
            self.rest.add_param_group(param_group)
            self.param_groups.append(self.rest.param_groups[-1])
            return
        super().add_param_group(param_group)
        for frame in self.param_groups[-1]["params"]:
            if frame.ndim not in (2, 3) or frame.shape[-1] > frame.shape[-2]:
                raise UserError(f"a frame is [N R] or [B N R] with R of at most N, but one is {list(frame.shape)}")
            ranks = ranks_of(frame)
            if ranks is not None and frame.ndim == 2:
                raise UserError("a frame [N R] is split over ranks along its columns; give it a first axis, [1 N R]")
            if ranks is not None and split_axis(frame, ranks) != 0:
                raise UserError(
                    f"frames {list(frame.shape)} are split over ranks along axis {split_axis(frame, ranks)}, and a "
                    "step needs whole ones; let their module declare parameter_kinds 'frames', which FSDP2 splits "
                    "along the first axis"
                )
            if frame.dtype not in (torch.float32, torch.float64):
                raise UserError(
                    f"a frame of {frame.dtype} is orthonormal to two digits and loses small steps; train with "
                    "trainer.precision=bf16-mixed, which keeps weights in float32"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rest": self.rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's. Raises: UserError for state of other groups or another `rest`; nothing is changed then."""
        with_own_groups(self, state_dict)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frames: list[tuple[Any, dict[str, Any]]] = [
            (frame, group)
            for group in self.param_groups
            if group.get("frames")
            for frame in group["params"]
            if frame.grad is not None
        ]
        # All ranks raise or none.
        wrong = total_over((ranks_of(frame), (~local(frame.grad).isfinite()).sum()) for frame, _ in frames)
        if has_values(wrong) and wrong:
            raise UserError(
                "the gradient of a frame is not finite; nothing was changed. Lower the learning rate or clip "
                "gradients, and check the loss and the data of this step"
            )
        if self.rest is not None:
            self.rest.step()
        for frame, group in frames:
            self._move(frame, group)
        return loss

    def _move(self, frame: Any, group: dict[str, Any]) -> None:
        state = self.state[frame]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["momentum_buffer"] = torch.zeros_like(frame)
        state["step"] += 1
        s_BNR, m_BNR, d_BNR = (_batched(local(x)) for x in (frame, state["momentum_buffer"], frame.grad))
        m_BNR.copy_(Horizontal(s_BNR).push(group["momentum"] * m_BNR + d_BNR))
        if group["retraction"] == "qr":
            s_BNR.copy_(orthonormalised(s_BNR - group["lr"] * m_BNR))
        else:
            s_BNR.copy_(geodesic(s_BNR, m_BNR, -group["lr"]))
            if not has_values(s_BNR) or int(state["step"]) % group["orthonormalise_every"] == 0:
                s_BNR.copy_(orthonormalised(s_BNR))


def _batched(x: Tensor) -> Tensor:
    """A view [B N R]."""
    return x if x.ndim == 3 else x[None]


def _first(group: dict[str, Any]) -> Tensor:
    """The first parameter of a group, as it is given or as an optimiser has it."""
    found = next(iter([group["params"]] if isinstance(group["params"], Tensor) else group["params"]))
    return found[1] if isinstance(found, tuple) else found
