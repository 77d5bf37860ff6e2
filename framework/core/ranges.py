"""Settings that must lie in a range: one check and one message. Names are those of the arguments that a user sets."""

import math
from collections.abc import Sequence

from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import NUMBERS

FURTHEST, SQUARED = 9, 43
"""Deviations from the mean within which every normal number is that torch draws (8.6 from 53 bits), and the logarithm,
rounded down, of numbers whose square, or its inverse, is an ordinary number of float32.
"""


def require_in(interval: str, **settings: float | Sequence[float] | None) -> None:
    """Raises: UserError for a setting outside an interval; of a sequence for any of its numbers. None is not set, and
    passes; NaN lies in no interval.

    Args:
        interval: as it is written, such as "[0, 1)", "(0, inf)" or, where infinity is allowed, "[1, inf]".
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, given in settings.items():
        numbers = () if given is None else given if isinstance(given, Sequence) else (given,)
        for number in numbers:
            above = low <= number if interval[0] == "[" else low < number
            below = number <= high if interval[-1] == "]" else number < high
            if not (above and below):
                shown = list(numbers) if isinstance(given, Sequence) else given
                raise UserError(f"{name}={shown} must {_in_words(interval, low, high, number)}")


def _in_words(interval: str, low: float, high: float, number: float) -> str:
    if high < math.inf:
        return f"lie in {interval}"
    finite = "" if isinstance(number, int) else " and finite"
    return f"be {'at least' if interval[0] == '[' else 'above'} {low:g}{finite}"


def require_numbers(numbers: float, **settings: object) -> None:
    """What settings alone make large, such as a sample of some size. Raises: UserError, before any of it is made, for
    more numbers than the limit of `NUMBERS`.

    Args:
        numbers: that are in memory at once, as far as the settings tell.
        settings: of which they follow.
    """
    if not numbers <= NUMBERS.most:
        shown = ", ".join(f"{name}={list(x) if isinstance(x, tuple) else x}" for name, x in settings.items())
        lower = "it" if len(settings) == 1 else "one of them"
        raise UserError(
            f"{shown} would take {numbers:,} numbers at once, above the limit of {NUMBERS.most:,}; lower {lower}, or "
            f"raise the limit with {NUMBERS.setting} in the environment"
        )


def require_shares(**shares: float) -> None:
    """Shares of a run or of a sum, and momenta of averages. Raises: UserError for one outside [0, 1]."""
    require_in("[0, 1]", **shares)


def require_weights(**weights: float) -> None:
    """Weights of the terms of a loss. Raises: UserError for one below 0, infinite or NaN."""
    require_in("[0, inf)", **weights)


def require_temperatures(**temperatures: float | Tensor) -> None:
    """What divides logits. Raises: UserError for a number that is not finite and above 0. Tensors are not read: they
    may be on a device.
    """
    for name, temperature in temperatures.items():
        if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
            raise UserError(f"{name}={temperature} must be above 0 and finite; 0.04 to 0.5 are usual")


def require_log_normal(**settings: float) -> None:
    """Mean and standard deviation, in this order, of the logarithm of a number that is drawn. Raises: UserError for a
    deviation below 0, or where the number could be so large or small that float32 does not hold its square: e to a
    normal number, of which torch draws none further than `FURTHEST` deviations from the mean.
    """
    mean, std = settings.values()
    (mean_name, std_name) = settings
    require_in("(-inf, inf)", **{mean_name: mean})
    require_in("[0, inf)", **{std_name: std})
    reach = abs(mean) + FURTHEST * std
    if not reach <= SQUARED:
        raise UserError(
            f"{mean_name}={mean:g} and {std_name}={std:g} draw numbers of up to e^{reach:.3g} or down to "
            f"e^-{reach:.3g}, whose squares float32 does not hold; the size of {mean_name} plus {FURTHEST} times "
            f"{std_name} must be at most {SQUARED}"
        )
