"""The curve of an intrinsic dimension as a PNG."""

import io
import textwrap
from typing import Any

from lightspan.intrinsic.curve import Curve

_INK, _SEED, _LINE, _SOFT = "#1f5fd0", "#9bb8ea", "#d1560f", "#5b6470"


def picture(curve: Curve, metric: str, threshold: float, references: dict[str, Any], title: str) -> bytes:
    """PNG bytes (150 dpi): every seed as a dot, their means as a curve, the line, the baseline and what needs no
    training. The resulting dimension is marked.

    Args:
        references: "untrained", "constant_answer" and "linear_probe", each a number or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    points = {dim: point for dim, point in curve.points.items() if point.values}
    for dim, point in points.items():
        axes.plot([dim] * len(point.values), list(point.values.values()), "o", color=_SEED, markersize=4)
    dims, means = list(points), [point.mean for point in points.values()]
    axes.plot(dims, means, "-o", color=_INK, linewidth=1.8, markersize=4.5, label="mean over seeds")
    axes.axhline(curve.baseline.mean, color=_SOFT, linewidth=1.2, label="all weights")
    axes.axhline(curve.line, color=_LINE, linewidth=1.2, label=f"line, threshold {threshold:g}")
    styles = {"linear_probe": ("linear probe, frozen features", "--"), "constant_answer": ("most frequent class", ":")}
    for key, (label, style) in styles.items():
        if references.get(key) is not None:
            axes.axhline(references[key], color=_SOFT, linewidth=1, linestyle=style, label=label)
    if curve.reached is not None:
        axes.axvline(curve.reached, color=_LINE, linewidth=1, linestyle=":")
        axes.annotate(
            f"d = {curve.reached:,}", (curve.reached, curve.line), xytext=(-5, 5), textcoords="offset points",
            color=_LINE, fontweight="bold", ha="right",
        )  # fmt: skip
    positive = [dim for dim in dims if dim > 0]
    if positive and max(positive) > 10 * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)  # which has room for d = 0
        axes.set_xlim(dims[0] - 0.2 * min(positive), 1.15 * dims[-1])
    axes.set_xticks(dims, [f"{dim:,}" for dim in dims], rotation=45, ha="right", fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="dimension of the subspace d", ylabel=metric)
    axes.grid(color="#e9ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    lines = textwrap.fill(title, 76)  # a number of characters that always fits the width
    figure.suptitle(lines, fontsize=10, fontweight="bold", x=0.01, ha="left")
    buffer = io.BytesIO()
    # Software and date are left out, so that equal results give equal bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
