"""Line charts as inline SVG: colours are CSS variables, so one picture serves light and dark; hover needs no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lightspan.cli.report.curves import SMALLEST, XY, at_or_before, finite, thin, ticks, window
from lightspan.cli.report.markup import escape
from lightspan.cli.runs.numbers import number

WIDTH, HEIGHT = 440, 264
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 38
DEEP = HEIGHT - TOP - BOTTOM
COLOURS = 6
MOST_POINTS, MOST_STRIPS, MOST_DOTS = 500, 40, 60


@dataclass(frozen=True)
class ChartLine:
    """One run in a chart: `points` as logged; `smoothed`, if given, is drawn thick and the points thin behind it;
    `band` is a surface, (x, low, high) at each x. Without `joined` it is dots.
    """

    name: str
    colour: int
    points: list[XY]
    smoothed: list[XY] = field(default_factory=list)
    band: list[tuple[float, float, float]] = field(default_factory=list)
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart's content. `log_x` and `log_y` need positive values: others are left out. With `things` the places on the
    x axis are so many things that stand side by side, at 0, 1, ...: no line joins them.
    """

    title: str
    x_label: str
    y_label: str
    curves: list[ChartLine]
    log_y: bool = False
    log_x: bool = False
    note: str = ""
    things: int = 0


def draw(chart: Chart) -> str:
    """The chart as one <figure>: axes, units, curves, hover read-outs, and a note on what was cut or left out."""
    shape = _Shape(chart)
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(shape.spoken())}">'
        f"{shape.axes()}{''.join(shape.curve(curve) for curve in chart.curves)}{shape.strips()}</svg>"
        f"{shape.notes()}</figure>"
    )


class _Shape:
    """The scales of one chart and the SVG pieces that use them."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        bands = [self._shown([(x, y) for x, *ys in curve.band for y in ys]) for curve in chart.curves]
        drawn = [self._shown(curve.smoothed or curve.points) for curve in chart.curves]
        everything = [self._shown(curve.points) for curve in chart.curves]
        self.low, self.high, self.above, self.peak = window(everything)
        if self.above == 0:
            self.low = min([self.low, *(y for band in bands for _, y in band)])
            self.high = max([self.high, *(y for band in bands for _, y in band)])
        floor = -math.inf if self.low < 0 or chart.log_y else 0.0  # of what is never negative, as a share or a count
        self.lost = sum(len(curve.points) for curve in chart.curves) - sum(map(len, everything))
        if self.above == 0 and self.high > self.low:
            pad = 0.04 * (self.high - self.low)
            self.low, self.high = self.low - pad, self.high + pad
        # Side by side only differences count that are worth a look: not those of rounding to whole entries.
        flat = 0.01 * max(abs(self.low), abs(self.high)) if chart.things else 0.0
        if self.high - self.low <= max(SMALLEST, flat):
            pad = abs(self.low) * 0.05 or 1.0
            self.low, self.high = max(floor, self.low - pad), self.high + pad
        xs = [x for curve in everything for x, _ in curve] or [0.0, 1.0]
        self.first, self.last = min(xs), max(xs)
        if self.last - self.first <= SMALLEST:
            self.first, self.last = self.first - 1, self.last + 1
        self.drawn = drawn

    def _shown(self, points: Sequence[XY]) -> list[XY]:
        kept = finite(points)
        if self.chart.log_x:
            kept = [(math.log10(x), y) for x, y in kept if x > 0]
        return [(x, math.log10(y)) for x, y in kept if y > 0] if self.chart.log_y else kept

    def _x(self, x: float) -> float:
        return LEFT + (x - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def _y(self, y: float) -> float:
        # Points above the frame are clipped; far ones are kept near it to keep the numbers short.
        share = min(1.5, (y - self.low) / (self.high - self.low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def _value(self, y: float) -> float:
        return 10**y if self.chart.log_y else y

    def _place(self, x: float) -> float:
        return 10**x if self.chart.log_x else x

    def axes(self) -> str:
        right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value in self._y_ticks():
            y, text = self._y(value), _power(value) if self.chart.log_y else _short(value, self.high - self.low)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        for value in self._x_ticks():
            x, text = self._x(value), _power(value) if self.chart.log_x else _short(value, self.last - self.first)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{escape(text)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {floor}H{right}"/>')
        parts.append(
            f'<text class="label" x="{right}" y="{HEIGHT - 5}" text-anchor="end">{escape(self.chart.x_label)}</text>'
        )
        parts.append(
            f'<text class="label" x="{LEFT - 7}" y="13" text-anchor="start">{escape(self.chart.y_label)}</text>'
        )
        return "".join(parts)

    def _x_ticks(self) -> list[float]:
        if self.chart.log_x:
            return _decades(self.first, self.last)
        values, things = ticks(self.first, self.last, 5), self.chart.things
        return [value for value in values if value.is_integer() and 0 <= value < things] if things else values

    def _y_ticks(self) -> list[float]:
        if not self.chart.log_y:
            return ticks(self.low, self.high, 5)
        return _decades(self.low, self.high)

    def curve(self, curve: ChartLine) -> str:
        look = f'style="stroke:var(--run{curve.colour % COLOURS})"' + (
            ' stroke-dasharray="6 4"' if curve.colour >= COLOURS else ""
        )
        raw, top = self._shown(curve.points), self._shown(curve.smoothed)
        parts = []
        if curve.band:
            parts.append(
                f'<path class="band" style="fill:var(--run{curve.colour % COLOURS})" d="{self._band(curve)}"/>'
            )
        if top:
            parts.append(f'<path class="raw" {look} d="{self._path(raw)}"/>')
        dotted = bool(self.chart.things) or not curve.joined
        if not dotted:
            parts.append(f'<path class="line" {look} d="{self._path(top or raw)}"/>')
        if dotted or (not top and len(raw) <= MOST_DOTS):
            dots = (f'<circle cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="2.4"/>' for x, y in raw if y <= self.high)
            parts.append(f'<g style="fill:var(--run{curve.colour % COLOURS})">{"".join(dots)}</g>')
        # A nested svg clips to its own frame, which needs no ids that could clash between charts.
        return (
            f'<svg x="0" y="{TOP - 4}" width="{WIDTH}" height="{HEIGHT - BOTTOM - TOP + 6}" '
            f'viewBox="0 {TOP - 4} {WIDTH} {HEIGHT - BOTTOM - TOP + 6}">{"".join(parts)}</svg>'
        )

    def _path(self, points: Sequence[XY]) -> str:
        return (
            "M" + "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in thin(points, MOST_POINTS)) if points else ""
        )

    def _band(self, curve: ChartLine) -> str:
        step = 1 + len(curve.band) // MOST_POINTS
        some = [*curve.band[::step], *curve.band[-1:]]
        lower, upper = (self._shown([(point[0], point[at]) for point in some]) for at in (1, 2))
        outline = [*upper, *reversed(lower)]
        return "M" + "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in outline) + "Z" if outline else ""

    def strips(self) -> str:
        """Invisible columns: the one under the pointer shows its x and every run's value there."""
        marks = sorted({x for points in self.drawn for x, _ in points})
        marks = [
            marks[at * (len(marks) - 1) // max(1, min(len(marks), MOST_STRIPS) - 1)]
            for at in range(min(len(marks), MOST_STRIPS))
        ]
        marks = sorted(set(marks))
        edges = [LEFT, *((self._x(a) + self._x(b)) / 2 for a, b in pairwise(marks)), WIDTH - RIGHT]
        parts = []
        for mark, left, right in zip(marks, edges, edges[1:], strict=False):
            values = [
                (curve, at_or_before(points, mark)) for curve, points in zip(self.chart.curves, self.drawn, strict=True)
            ]
            said = "".join(
                f'<tspan dx="9" style="fill:var(--run{curve.colour % COLOURS})">{number(self._value(y))}</tspan>'
                for curve, y in values
                if y is not None
            )
            parts.append(
                f'<g class="hit"><rect x="{left:.1f}" y="{TOP}" width="{max(0.5, right - left):.1f}" height="{DEEP}"/>'
                f'<g class="tip"><path class="axis" d="M{self._x(mark):.1f} {TOP}v{DEEP}"/>'
                f'<text x="{WIDTH - RIGHT}" y="13" text-anchor="end">{number(self._place(mark))}{said}</text></g></g>'
            )
        return "".join(parts)

    def notes(self) -> str:
        texts = [self.chart.note] if self.chart.note else []
        if self.above:
            texts.append(
                f"the axis is cut: {self.above} early values, up to {number(self._value(self.peak))}, are above it"
            )
        if self.lost:
            why = "not finite or not positive" if self.chart.log_y else "not finite (NaN, infinite or beyond 1e300)"
            texts.append(f"{self.lost} values are {why} and cannot be drawn")
        return f'<p class="note">{escape("; ".join(texts))}</p>' if texts else ""

    def spoken(self) -> str:
        ends = [
            f"{c.name} ends at {number(p[-1][1] if not self.chart.log_y else 10 ** p[-1][1])}"
            for c, p in zip(self.chart.curves, self.drawn, strict=True)
            if p
        ]
        return f"{self.chart.title} over {self.chart.x_label}: {', '.join(ends)}"


def _short(value: float, span: float) -> str:
    """A tick's text with as many decimals as ticks `span` / 4 apart need."""
    if abs(value) >= 1e5:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    decimals = max(0, 1 - math.floor(math.log10(span / 4))) if span > 0 else 0
    if decimals > 4 and abs(value) < 0.01:
        return f"{value:.3g}".replace("e-0", "e-")
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: whole exponents, or round ones between them where there are too few."""
    decades = [float(at) for at in range(math.ceil(low), math.floor(high) + 1)]
    return decades[:: max(1, len(decades) // 5)] if len(decades) > 1 else ticks(low, high, 3)


def _power(exponent: float) -> str:
    """10 to the `exponent` as text; whole exponents in superscript digits."""
    if exponent != int(exponent):
        return number(10**exponent)
    return "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
