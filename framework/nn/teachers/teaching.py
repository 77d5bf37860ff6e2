"""What methods that learn from a teacher or from prototypes share beside their losses."""

import math
from collections.abc import Iterable, Mapping

from torch import nn

from lightspan.errors import UserError


def require_schedules(shares: Mapping[str, float], temperatures: Mapping[str, float]) -> None:
    """Raises: UserError unless all shares of a run, of a sum and of an average lie in [0, 1] and all temperatures are
    above 0 and finite.
    """
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} must lie in [0, 1]")
    if not all(0 < value < math.inf for value in temperatures.values()):
        told = ", ".join(f"{name}={value}" for name, value in temperatures.items())
        raise UserError(f"{told}: temperatures must be above 0 and finite; 0.04 to 0.1 are usual")


def require_weights(**weights: float) -> None:
    """Raises: UserError unless all weights of terms of a loss are at least 0 and finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"{name}={weight} must be at least 0 and finite")


def leave_in_place(parts: Iterable[nn.Module]) -> None:
    """The next step of the optimiser leaves the weights of these parts alone, as DINO and SwAV treat prototypes in
    their first epoch: they have no gradient, which is not a gradient of zero, so they do not decay either.
    """
    for part in parts:
        for parameter in part.parameters():
            parameter.grad = None
