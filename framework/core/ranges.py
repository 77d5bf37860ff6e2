"""Settings that must lie in a range, one message for each kind. Names are those of the arguments that a user sets."""

import math

from torch import Tensor

from lightspan.core.errors import UserError


def require_shares(**shares: float) -> None:
    """Shares of a run or of a sum, and momenta of averages. Raises: UserError for one outside [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name}={share} must lie in [0, 1]")


def require_weights(**weights: float) -> None:
    """Weights of the terms of a loss. Raises: UserError for one below 0, infinite or NaN."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"{name}={weight} must be at least 0 and finite")


def require_temperatures(**temperatures: float | Tensor) -> None:
    """What divides logits. Raises: UserError for a number that is not finite and above 0. Tensors are not read: they
    may be on a device.
    """
    for name, temperature in temperatures.items():
        if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
            raise UserError(f"{name}={temperature} must be above 0 and finite; 0.04 to 0.5 are usual")
