"""How figures are written for people: by significant digits, so that small and large ones keep theirs."""

import math

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
SCORE_DIGITS = 5  # the last ones decide between runs


def number(value: float, digits: int = 4) -> str:
    """Readable at a glance: whole numbers whole, thousands separated, others with `digits` significant ones."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1e15 and (value == int(value) or abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}".replace(",", NARROW_SPACE)
    if 1000 <= abs(value) < 10 ** (digits - 1):
        return f"{value:,.{digits - len(str(int(abs(value))))}f}".replace(",", NARROW_SPACE)
    return f"{value:.{digits}g}" if abs(value) >= 0.001 else f"{value:.{digits - 1}e}"


def spread_text(value: float) -> str:
    """A standard deviation, of which more than two digits say nothing."""
    rounded = float(f"{value:.2g}")
    return number(rounded) if rounded >= 0.001 else f"{rounded:g}"
