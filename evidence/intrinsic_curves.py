"""Accuracy over the dimension of random subspaces, and its picture, for the evidence of system 41.

The paper (arXiv 1804.08838) trained for 100 epochs on all of MNIST, at several rates. Here nets train on 4,000 digits
for 30 (FC) and 20 (LeNet) epochs, or on 5,000 of the 60,000 Fashion-MNIST images for as many steps, and every dimension
of a curve has the same rate. Baselines are lower than the paper's, and so is the line: the two columns of d90 are
related but not the same measurement. The paper has no figure for Fashion-MNIST.

Dense maps are limited to 10^8 entries, d = 500 for FC, and a step with them costs D d, so their grids are coarser and
shorter. intrinsic_dimension.py says what d90 is and how rates were chosen.

`python evidence/intrinsic_curves.py` draws the picture anew from the records.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from intrinsic_dimension import FASHION, MNIST, PROJECTIONS, SHARE, Task, record, record_baseline, spread, trace

from lightspan.core.drawing import COLOURS, SOFT, canvas, png, tidy
from lightspan.core.files.atomic import write_atomic

SETS = {"MNIST-5k": MNIST, "Fashion-MNIST, 5,000 images": FASHION}
PAPER = {MNIST["FC"]: 750, MNIST["LeNet"]: 290}  # d90 on all of MNIST
RESULTS = Path(__file__).parent / "results"
COLOURS_OF = dict(zip(("Fastfood", "sparse", "dense"), COLOURS[:3], strict=True))


def measure(evidence, task: Task, grid: Iterable[int], dense: Iterable[int]) -> None:
    """Records the curves of all projections, over `grid` or `dense`, and draws the picture anew."""
    record_baseline(evidence, task)
    grids = {kind: tuple(dense if kind == "dense" else grid) for kind in PROJECTIONS}
    curves = {kind: trace(task, kind, dims) for kind, dims in grids.items()}
    for curve in curves.values():
        record(evidence, curve)
    if task in PAPER:
        evidence.figure(f"d90 in the paper, on all of MNIST, {task.name}", PAPER[task])
    reaching = [curve.d90 for kind, curve in curves.items() if curves["Fastfood"].d90 <= grids[kind][-1]]
    ratio = spread(reaching or [math.inf])
    evidence.claim(f"d90 of the projections, largest over smallest, {task.name}", ratio, at_most=1.5)
    evidence.write(complete=False)  # so that the picture has it; the end of the test writes it whole
    draw()


def draw() -> None:
    """Replaces the picture by one of all records."""
    found: dict[str, dict[int, float]] = {}
    for path in RESULTS.glob("41_intrinsic_dimension_*.json"):
        for one in json.loads(path.read_text())["figures"]:
            found.setdefault(one["name"], {})[one["seed"]] = math.inf if one["value"] is None else one["value"]
    write_atomic(RESULTS / "41_intrinsic_dimension_mnist.png", picture(found))


def picture(found: dict[str, dict[int, float]]) -> bytes:
    """PNG bytes: means over seeds as lines, lowest to highest as bands, d90 as stars; a row for each measured set."""
    sets = {name: nets for name, nets in SETS.items() if f"D, {nets['FC'].name}" in found}
    figure, panels = canvas("", (9, 3.2 * len(sets)), (len(sets), 2), sharey="row")
    for row, (name, nets) in zip(panels, sets.items(), strict=True):
        row[0].set_ylabel("test accuracy in %")
        for axes, (net, task) in zip(row, nets.items(), strict=True):
            if f"D, {task.name}" not in found:
                axes.set_axis_off()
                continue
            axes.set_title(f"{name}, {net}, D = {task.weights:,}", fontsize=10, loc="left")
            axes.set_xlabel("dimension of the subspace d")
            _panel(axes, task, found)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return png(figure)


def _panel(axes, task: Task, found: dict[str, dict[int, float]]) -> None:
    whole = mean(found[f"accuracy with all weights, {task.name}"].values())
    axes.axhline(whole, color=SOFT, linewidth=1.2, linestyle="--", label="all weights")
    axes.axhline(SHARE * whole, color=SOFT, linewidth=1.2, linestyle=":", label=f"{100 * SHARE:.0f} % of that")
    text, ticks = ["d90 (\N{BLACK STAR})"], set()
    for kind, colour in COLOURS_OF.items():
        prefix = f"accuracy, {task.name}, {kind}, d = "
        points = {int(name.removeprefix(prefix)): found[name].values() for name in found if name.startswith(prefix)}
        dims, means = list(points), [mean(values) for values in points.values()]
        low, high = [min(values) for values in points.values()], [max(values) for values in points.values()]
        axes.plot(dims, means, "-o", color=colour, linewidth=1.6, markersize=3.5, label=kind)
        axes.fill_between(dims, low, high, color=colour, alpha=0.18, linewidth=0)
        (d90,) = found[f"d90 of the mean, {task.name}, {kind}"].values()
        if d90 in points:
            axes.plot(d90, means[dims.index(d90)], "*", color=colour, markersize=13, markeredgecolor="white")
        text.append(f"{kind} {d90:.0f}" if d90 in points else f"{kind} not up to {dims[-1]}")
        ticks |= points.keys()
    if task in PAPER:
        text.append(f"paper, all of MNIST {PAPER[task]}")
    axes.text(0.98, 0.05, "\n".join(text), transform=axes.transAxes, ha="right", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [str(dim) for dim in sorted(ticks)], fontsize=7)
    axes.minorticks_off()
    tidy(axes)


if __name__ == "__main__":
    draw()
