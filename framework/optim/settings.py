"""The update rule of a low-rank optimiser, and which settings it and its parameter groups may have."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightspan.errors import UserError
from lightspan.optim.bases import Basis, Trigger
from lightspan.optim.inner import Adam, Inner
from lightspan.optim.layout import Layout, State
from lightspan.optim.loading import described
from lightspan.optim.moments import MomentStorage
from lightspan.optim.residuals import Residual


@dataclass(frozen=True)
class UpdateRule:
    """The parts that a low-rank optimiser is made of; each published one is one combination of them."""

    basis: Basis
    residual: Residual
    inner: Inner
    moments: MomentStorage
    trigger: Trigger

    @property
    def projects_late(self) -> bool:
        """Whether gradients are projected in the second half of a step, those of one bucket at a time: error feedback
        adds to clipped gradients, and whole coordinates are as large as gradients are.
        """
        return self.residual.feeds_back or self.basis.whole

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
        changed = {name: replace(parts[name], **settings) for name, settings in own.items()}
        return replace(self, **changed) if changed else self

    def fixed(self) -> dict[str, str]:
        """The parts without what groups have, in words: what a saved state must have been made by."""
        return {
            "basis": described(self.basis),
            "residual": described(self.residual, self.residual.of_groups),
            "inner": described(self.inner, self.inner.of_groups),
            "moments": described(self.moments),
            "refresh": described(self.trigger),
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite() & (value >= 0))
    return _is_number(value) and value >= 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_number(v) and 0 <= v < 1 for v in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value))


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_rate, "at least 0, a number or a tensor of one"),
    "other_lr": (_is_rate, "at least 0, a number or a tensor of one"),
    "rank": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        "at least 1, a whole number",
    ),
    "betas": (_is_pair, "in [0, 1), two numbers"),
    "eps": (lambda value: _is_number(value) and value >= 0, "at least 0"),
    "weight_decay": (lambda value: _is_number(value) and value >= 0, "at least 0"),
    "project": (_are_names, "True, False or a list of patterns of parameter names"),
    "stacks": (_are_names, "True, False or a list of patterns of parameter names"),
    "heads": (
        lambda value: isinstance(value, Mapping) and all(_is_text(name) and _are_rows(value[name]) for name in value),
        "a mapping from names of parameters to lists of whole numbers of rows, each at least 1",
    ),
    "scale": (lambda value: _is_number(value) and value > 0, "above 0"),
    "max_norm": (lambda value: value is None or (_is_number(value) and value > 0), "above 0, or None"),
    "backward": (lambda value: value in ("whole", "hooks", "projected"), "'whole', 'hooks' or 'projected'"),
    "offload": (lambda value: isinstance(value, bool), "True or False"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
}
"""The allowed values of each setting, by name."""


def _are_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(rows) is int and rows >= 1 for rows in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def accepted(kind: type) -> list[str]:
    """The names of the settings that a class' constructor takes, those included that it passes on."""
    names: dict[str, None] = {}
    for constructor in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        own = inspect.signature(constructor).parameters.values()
        names |= dict.fromkeys(each.name for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
        if all(each.kind is not each.VAR_KEYWORD for each in own):
            break
    return [name for name in names if name != "self"]


def naming_unknown(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that refuses unknown settings in the name of the class that is built, not of the base that would be
    the first to miss them.
    """

    @wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        known = accepted(type(self))
        if unknown := settings.keys() - set(known):
            raise UserError(
                f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}; it takes {', '.join(known)}"
            )
        init(self, *args, **settings)

    return checked


def require_sound(owner: str, settings: Mapping[str, Any]) -> None:
    """Raises: UserError for the first of `settings` that is outside its limits; keys without limits are ignored.

    Args:
        owner: the optimiser, and the parameter group if the settings belong to one.
    """
    for name, (sound, limit) in LIMITS.items():
        if name in settings and not sound(settings[name]):
            raise UserError(f"{owner} {name}={settings[name]} must be {limit}")


def require_parts(rule: UpdateRule) -> None:
    """Raises: UserError for a part that is not an object of its kind, such as the name of one."""
    parts = (
        ("basis", rule.basis, Basis), ("residual", rule.residual, Residual), ("inner", rule.inner, Inner),
        ("moments", rule.moments, MomentStorage), ("refresh", rule.trigger, Trigger),
    )  # fmt: skip
    for name, part, kind in parts:
        if not isinstance(part, kind):
            raise UserError(f"{name}={part!r} must be an object of a class in {kind.__module__}, a {kind.__name__}")


def require_fit(rule: UpdateRule, backward: str, offload: bool) -> None:
    """Raises: UserError for parts of a rule that do not fit one another, the backward mode or state on the host."""
    if offload and rule.basis.momentum and not rule.projects_late:
        raise UserError(
            f"offload={offload} keeps moments on the host until gradients are projected, but PowerBasis momentum="
            f"{rule.basis.momentum} needs them for that; set momentum=0, or a residual=ErrorFeedback(), with which "
            "gradients are projected later"
        )
    if rule.basis.momentum and not isinstance(rule.inner, Adam):
        raise UserError(f"PowerBasis momentum={rule.basis.momentum} follows Adam's first moment; leave inner=Adam()")
    if rule.inner.by_heads and not rule.basis.whole:
        raise UserError(
            f"{type(rule.inner).__name__} by_heads=True needs the rows of each head, but coordinates in "
            f"{type(rule.basis).__name__} are not rows of the parameter; set by_heads=False, or basis=WholeBasis()"
        )
    if rule.residual.needs_orthonormal and not rule.basis.orthonormal:
        raise UserError(
            f"{type(rule.basis).__name__} has no orthonormal frames, which residual="
            f"{type(rule.residual).__name__} needs; use it with Apollo(), or choose PowerBasis"
        )
    if backward != "whole" and rule.basis.whole:
        raise UserError(
            f"backward={backward!r} keeps coordinates instead of gradients, but those of {type(rule.basis).__name__} "
            "are as large; set backward='whole'"
        )
    if backward != "whole" and rule.residual.needs_gradient:
        raise UserError(
            f"backward={backward!r} keeps only coordinates of the gradient, but residual="
            f"{type(rule.residual).__name__} needs all of it; set residual=None or backward='whole'"
        )
