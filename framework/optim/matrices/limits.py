"""Which settings an optimiser and its parameter groups may have, and which values of them."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, get_args

from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.optim.matrices.conventions import Convention
from lightspan.optim.matrices.newton_schulz import Coefficients, Precision


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite() & (value >= 0))
    return _is_number(value) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_share(v) for v in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value))


def _is_one_of(names: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


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
    "owners": (lambda value: isinstance(value, bool), "True or False"),
    "momentum": (_is_share, "in [0, 1)"),
    "beta2": (_is_share, "in [0, 1)"),
    "nu": (
        lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
        "in [0, 1], or None for the momentum",
    ),
    "fraction": (lambda value: _is_number(value) and 0 < value <= 1, "in (0, 1]"),
    "convention": _is_one_of(get_args(Convention)),
    "precision": _is_one_of(get_args(Precision)),
    "coefficients": _is_one_of(get_args(Coefficients)),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
}
"""The allowed values of each setting, by name."""


def _are_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(rows) is int and rows >= 1 for rows in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def require_valid(owner: str, settings: Mapping[str, Any]) -> None:
    """Raises: UserError for the first of `settings` that is outside its limits; keys without limits are ignored.

    Args:
        owner: the optimiser, and the parameter group if the settings belong to one.
    """
    for name, (sound, limit) in LIMITS.items():
        if name in settings and not sound(settings[name]):
            raise UserError(f"{owner} {name}={settings[name]!r} must be {limit}")


def require_part(name: str, part: object, kind: type) -> None:
    """Raises: UserError for a setting that is not an object of its kind, such as the name of one."""
    if not isinstance(part, kind):
        raise UserError(f"{name}={part!r} must be an object of a class in {kind.__module__}, a {kind.__name__}")


def accepted(kind: type) -> list[str]:
    """The names of the settings that a class' constructor takes, those included that it passes on."""
    names: dict[str, None] = {}
    for constructor in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        own = inspect.signature(constructor).parameters.values()
        names |= dict.fromkeys(each.name for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
        if all(each.kind is not each.VAR_KEYWORD for each in own):
            break
    return [name for name in names if name != "self"]


def refuse_unknown_settings(init: Callable[..., None]) -> Callable[..., None]:
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
