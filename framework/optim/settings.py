"""Which settings a low-rank optimiser and its parameter groups may have."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightspan.errors import UserError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    return value.numel() == 1 and bool(value >= 0) if isinstance(value, Tensor) else _is_number(value) and value >= 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_number(v) and 0 <= v < 1 for v in value)


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_rate, "at least 0, a number or a tensor of one"),
    "rank": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        "at least 1, a whole number",
    ),
    "betas": (_is_pair, "in [0, 1), two numbers"),
    "eps": (lambda value: _is_number(value) and value >= 0, "at least 0"),
    "weight_decay": (lambda value: _is_number(value) and value >= 0, "at least 0"),
    "project": (
        lambda value: isinstance(value, bool) or (isinstance(value, list | tuple) and all(map(_is_text, value))),
        "True, False or a list of patterns of parameter names",
    ),
    "scale": (lambda value: _is_number(value) and value > 0, "above 0"),
    "max_norm": (lambda value: value is None or (_is_number(value) and value > 0), "above 0, or None"),
    "backward": (lambda value: value in ("whole", "hooks", "projected"), "'whole', 'hooks' or 'projected'"),
}
"""What each setting may be, by name."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def require_sound(owner: str, settings: Mapping[str, Any]) -> None:
    """Raises: UserError for the first of `settings` that is outside its limits; keys without limits are not looked at.

    Args:
        owner: the optimiser, and the parameter group if the settings are one's.
    """
    for name, (sound, limit) in LIMITS.items():
        if name in settings and not sound(settings[name]):
            raise UserError(f"{owner} {name}={settings[name]} must be {limit}")
