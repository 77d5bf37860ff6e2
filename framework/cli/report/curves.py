"""Curves for charts: smoothing, thinning and axis ranges, as pure functions of (x, y) points."""

import bisect
import math
from collections.abc import Sequence

XY = tuple[float, float]
LONG = 40  # points; fewer are readable as they are
LARGEST, SMALLEST = 1e300, 1e-300
"""Values and ranges between which axes can be computed: beyond them, sums overflow and shares of a range vanish."""


def finite(points: Sequence[XY]) -> list[XY]:
    """The points that can be drawn: both coordinates are finite, and at most `LARGEST` in size."""
    return [(x, y) for x, y in points if abs(x) <= LARGEST and abs(y) <= LARGEST]


def smooth(points: Sequence[XY], span: float) -> list[XY]:
    """Exponential running mean without start-up bias; `span` >= 1 is its length in points (1 changes nothing)."""
    keep = 1 - 1 / span
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def thin(points: Sequence[XY], limit: int) -> list[XY]:
    """At most `limit` points: the lowest and highest of each of limit / 2 equal stretches, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    buckets = max(1, limit // 2)
    kept: list[XY] = []
    for at in range(buckets):
        stretch = points[at * len(points) // buckets : (at + 1) * len(points) // buckets]
        ends = {
            min(range(len(stretch)), key=lambda i: stretch[i][1]),
            max(range(len(stretch)), key=lambda i: stretch[i][1]),
        }
        kept += [stretch[i] for i in sorted(ends)]
    return kept


def window(curves: Sequence[Sequence[XY]]) -> tuple[float, float, int, float]:
    """The y range to draw: (low, high, how many points are above it, the highest of all).

    The first steps of a loss can be many times higher than all that follows and would flatten the rest. If the
    whole range of a long curve is more than twice its range after the first tenth, the axis shows the latter, and the
    caller must say so. Short curves are always shown whole.
    """
    points = [point for curve in curves for point in finite(curve)]
    if not points:
        return 0.0, 1.0, 0, 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    start, end = min(x for x, _ in points), max(x for x, _ in points)
    late = [y for x, y in points if x >= start + 0.1 * (end - start)]
    top = max(late) + 0.1 * (max(late) - low)
    if max(map(len, curves)) >= LONG and high - low > 2 * (top - low) > 0:
        return low, top, sum(y > top for _, y in points), high
    return low, high, 0, high


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    if not high - low > SMALLEST:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * at for at in range(first, last + 1)]


def at_or_before(points: Sequence[XY], x: float) -> float | None:
    """The y of the last point whose x is at most `x`, or None before the first point. Points are ordered by x."""
    at = bisect.bisect_right(points, x, key=lambda point: point[0])
    return points[at - 1][1] if at else None
