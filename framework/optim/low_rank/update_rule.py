"""The update rule of a low-rank optimiser: its parts, and which of them fit one another."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import Basis, Trigger
from lightspan.optim.low_rank.inner import Adam, Inner
from lightspan.optim.low_rank.residuals import Residual
from lightspan.optim.matrices.limits import require_part
from lightspan.optim.matrices.loading import described
from lightspan.optim.matrices.moments import MomentStorage
from lightspan.optim.matrices.stacks import Layout, State


@dataclass(frozen=True)
class UpdateRule:
    """The parts that a low-rank optimiser is made of; each published one is one combination of them.

    Raises: UserError for a part that is not an object of its kind.
    """

    basis: Basis
    residual: Residual
    inner: Inner
    moments: MomentStorage
    trigger: Trigger

    def __post_init__(self) -> None:
        require_part("basis", self.basis, Basis)
        require_part("residual", self.residual, Residual)
        require_part("inner", self.inner, Inner)
        require_part("moments", self.moments, MomentStorage)
        require_part("refresh", self.trigger, Trigger)

    @property
    def of_frames(self) -> frozenset[str]:
        """Names of the state that frames are made from. The first half of a step reads no other, unless frames follow
        momentum.
        """
        small = Layout(2, 2, 1, False, torch.float32, torch.device("meta"), (0,))
        return frozenset(self.basis.initial(small))

    def initial(self, layout: Layout) -> State:
        """State before the first step. The parts' names differ, so one mapping contains them all."""
        parts = (
            self.basis.initial(layout),
            self.inner.initial(layout, self.moments),
            self.residual.initial(layout),
        )
        return {key: value for part in parts for key, value in part.items()}

    def settings(self) -> dict[str, Any]:
        """The settings that every parameter group has too, with the values of the parts; see `Inner.of_groups`."""
        return {name: getattr(part, name) for part in (self.inner, self.residual) for name in part.of_groups}

    def of(self, group: Mapping[str, Any]) -> "UpdateRule":
        """The parts with the settings of a parameter group. Raises: UserError for a value out of range."""
        parts: dict[str, Any] = {"inner": self.inner, "residual": self.residual}
        own = {name: {key: group[key] for key in part.of_groups} for name, part in parts.items() if part.of_groups}
        return replace(self, **{name: replace(parts[name], **settings) for name, settings in own.items()})

    def fixed(self) -> dict[str, str]:
        """The parts without what groups have, in words: what a saved state must have been made by."""
        return {
            "basis": described(self.basis),
            "residual": described(self.residual, self.residual.of_groups),
            "inner": described(self.inner, self.inner.of_groups),
            "moments": described(self.moments),
            "refresh": described(self.trigger),
        }


def require_fit(rule: UpdateRule, backward: str, offload: bool, owners: bool) -> None:
    """Raises: UserError for parts of a rule that do not fit one another, the backward mode, state on the host, or
    owners.
    """
    if owners and backward != "whole":
        raise UserError(
            f"backward={backward!r} projects gradients on every rank, which needs the frames that owners={owners} "
            "keeps on one rank each; set owners=False, or backward='whole'"
        )
    if offload and rule.basis.momentum and not rule.residual.feeds_back:
        raise UserError(
            f"offload={offload} keeps moments on the host until gradients are projected, but PowerBasis momentum="
            f"{rule.basis.momentum} needs them for that; set momentum=0, or a residual=ErrorFeedback(), with which "
            "gradients are projected later"
        )
    if rule.basis.momentum and not isinstance(rule.inner, Adam):
        raise UserError(f"PowerBasis momentum={rule.basis.momentum} follows Adam's first moment; leave inner=Adam()")
    if rule.residual.needs_orthonormal and not rule.basis.orthonormal:
        raise UserError(
            f"{type(rule.basis).__name__} has no orthonormal frames, which residual="
            f"{type(rule.residual).__name__} needs; use it with Apollo(), or choose PowerBasis"
        )
    if backward != "whole" and rule.residual.needs_gradient:
        raise UserError(
            f"backward={backward!r} keeps only coordinates of the gradient, but residual="
            f"{type(rule.residual).__name__} needs all of it; set residual=None or backward='whole'"
        )
