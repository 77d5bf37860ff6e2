"""The figure of a curve: scores of all seeds over the logarithm of the samples, the fits, and ten times the data."""

from collections.abc import Mapping

import numpy as np

from lightspan.cli.runs.figures import SeedScores
from lightspan.core.drawing import COLOURS, SOFT, canvas, png, tidy
from lightspan.evaluation.scaling_laws import ScalingCurve

PLACES = 120  # of a line
DASHES = ("--", ":", "-.")


def drawn(title: str, metric: str, points: Mapping[int, SeedScores], curve: ScalingCurve, policy: str) -> bytes:
    """PNG bytes. The best form is a line with the band of its interval, the others are dashed; behind the largest size
    all of them are predictions.
    """
    figure, ((axes,),) = canvas(title, (7.4, 5.2))
    far = 10 * curve.sizes[-1]
    places = np.geomspace(curve.sizes[0], far, PLACES)
    others = iter(zip(COLOURS[1:], DASHES, strict=False))
    for one in curve.fits:
        best = one is curve.best
        colour, style = (COLOURS[0], "-") if best else next(others)
        found = [one.at(float(place)) for place in places]
        label = f"{one.law.form.name}: {one.law.form.text}"
        values = [interval.value for interval in found]
        axes.plot(
            places, values, style, color=colour, linewidth=2 if best else 1.3, label=label, zorder=3 if best else 2
        )
        if best and found[0].low is not None:
            ends = [[interval.low for interval in found], [interval.high for interval in found]]
            axes.fill_between(
                places, *ends, color=colour, alpha=0.13, linewidth=0, label="its 95 % interval over seeds"
            )
    axes.axvspan(curve.sizes[-1], far * 1.25, color=SOFT, alpha=0.06, linewidth=0)
    seen = [(size, value) for size, point in points.items() for value in point.values.values()]
    xs, ys = zip(*seen, strict=True)
    axes.scatter(xs, ys, s=18, color="black", alpha=0.65, linewidth=0, zorder=4, label="a seed")
    guess = curve.tenfold
    reach = [[0.0], [0.0]]
    if guess.low is not None and guess.high is not None:
        reach = [[guess.value - guess.low], [guess.high - guess.value]]
    axes.errorbar(
        [far], [guess.value], yerr=reach, fmt="D", color=COLOURS[0], markersize=6, capsize=4, zorder=5,
        label=f"ten times the data: {guess.value:.4g}",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(curve.sizes[0] / 1.25, far * 1.25)
    low, high = min(ys), max(*ys, guess.value)
    room = 0.12 * (high - low or abs(high) or 1.0)
    lowest, highest = (guess.value if end is None else end for end in (guess.low, guess.high))
    # The interval is shown as far as it does not push the points together.
    axes.set_ylim(max(min(low, lowest), low - 4 * room) - room, min(max(high, highest), high + 4 * room) + room)
    marks = [*curve.sizes, far]
    axes.set_xticks(marks, [f"{mark:,}" for mark in marks], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel=f"training samples\n{policy}", ylabel=metric)
    tidy(axes)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return png(figure)
