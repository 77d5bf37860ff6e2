"""Accuracy over the dimension of random subspaces (arXiv 1804.08838), on MNIST-5k and Fashion-MNIST, by three maps.

The paper trained for 100 epochs on all of MNIST, at several rates. Here nets train on 4,000 digits for 30 (FC) and 20
(LeNet) epochs, or on 5,000 of the 60,000 Fashion-MNIST images for as many steps, and every dimension of a curve has the
same rate. Baselines are lower than the paper's, and so is the line: the two columns of d90 are neighbours, not copies.
The paper has no figure for Fashion-MNIST.

Dense maps end at 10^8 entries, d = 500 for FC, and a step of theirs takes D d: for FC they are drawn up to d = 50,
where a run takes twice as long as with Fastfood, and for LeNet on a coarser grid. What d90 is and how rates were chosen
stands in intrinsic_dimension.py.

`python evidence/test_41_intrinsic_dimension_mnist.py` draws the picture anew from the record.
"""

import io
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from intrinsic_dimension import FASHION, MNIST, PROJECTIONS, SHARE, record, record_baseline, spread, trace

from lightspan.files import write_atomic

SETS = {"MNIST-5k": MNIST, "Fashion-MNIST, 5,000 images": FASHION}
GRID = {"FC": (10, 50, 200, 350, 500, 750, 1000), "LeNet": (10, 50, 150, 300, 400, 600)}
DENSE_GRID = {"FC": (10, 50), "LeNet": (50, 300, 400)}
PAPER = {"FC": 750, "LeNet": 290}  # d90 on all of MNIST
RECORD = Path(__file__).parent / "results" / "41_intrinsic_dimension_mnist.json"
COLOURS = {"Fastfood": "#1f5fd0", "sparse": "#d1560f", "dense": "#2a8a5b"}
SOFT = "#5b6470"


def grid(net: str, kind: str) -> tuple[int, ...]:
    return (DENSE_GRID if kind == "dense" else GRID)[net]


@pytest.mark.parametrize("images", SETS)
def test_curves_beside_the_papers_numbers(evidence, images: str) -> None:
    for net, task in SETS[images].items():
        record_baseline(evidence, task)
        curves = {kind: trace(task, kind, grid(net, kind)) for kind in PROJECTIONS}
        for curve in curves.values():
            record(evidence, curve)
        if images == "MNIST-5k":
            evidence.figure(f"d90 in the paper, on all of MNIST, {net}", PAPER[net])
        reaching = [curve.d90 for kind, curve in curves.items() if curves["Fastfood"].d90 <= grid(net, kind)[-1]]
        ratio = spread(reaching or [math.inf])
        evidence.claim(f"d90 of the projections, largest over smallest, {task.name}", ratio, at_most=1.5)
    write_atomic(RECORD.with_suffix(".png"), picture(evidence.record["figures"]))


def picture(figures: list[dict[str, Any]]) -> bytes:
    """PNG bytes: means over seeds as lines, lowest to highest as bands, d90 as stars; a row for each measured set."""
    from matplotlib.figure import Figure

    found: dict[str, list[float]] = {}
    for one in figures:
        found.setdefault(one["name"], []).append(math.inf if one["value"] is None else one["value"])
    sets = {images: nets for images, nets in SETS.items() if f"D, {nets['LeNet'].name}" in found}
    figure = Figure(figsize=(9, 3.2 * len(sets)), dpi=130, layout="constrained", facecolor="white")
    panels = figure.subplots(len(sets), 2, sharey="row", squeeze=False)
    for row, (images, nets) in zip(panels, sets.items(), strict=True):
        for axes, (net, task) in zip(row, nets.items(), strict=True):
            whole = mean(found[f"accuracy with all weights, {task.name}"])
            axes.axhline(whole, color=SOFT, linewidth=1.2, linestyle="--", label="all weights")
            axes.axhline(SHARE * whole, color=SOFT, linewidth=1.2, linestyle=":", label=f"{100 * SHARE:.0f} % of that")
            reached = ["d90 (\N{BLACK STAR})"]
            for kind, colour in COLOURS.items():
                dims = grid(net, kind)
                values = [found[f"accuracy, {task.name}, {kind}, d = {dim}"] for dim in dims]
                means = list(map(mean, values))
                axes.plot(dims, means, "-o", color=colour, linewidth=1.6, markersize=3.5, label=kind)
                axes.fill_between(dims, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.18, linewidth=0)
                (d90,) = found[f"d90 of the mean, {task.name}, {kind}"]
                if d90 in dims:
                    axes.plot(d90, means[dims.index(d90)], "*", color=colour, markersize=13, markeredgecolor="white")
                reached.append(f"{kind} {d90:.0f}" if d90 in dims else f"{kind} not up to {dims[-1]}")
            if images == "MNIST-5k":
                reached.append(f"paper, all of MNIST {PAPER[net]}")
            axes.text(0.98, 0.05, "\n".join(reached), transform=axes.transAxes, ha="right", fontsize=9)
            axes.set_title(f"{images}, {net}, D = {task.weights:,}", fontsize=10, loc="left")
            axes.set_xscale("log")
            axes.set_xticks(GRID[net], [str(dim) for dim in GRID[net]], fontsize=7)
            axes.minorticks_off()
            axes.grid(color="#e9ebee", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("test accuracy in %")
    for axes in panels[-1]:
        axes.set_xlabel("dimension of the subspace d")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # equal results give equal bytes
    return buffer.getvalue()


if __name__ == "__main__":
    write_atomic(RECORD.with_suffix(".png"), picture(json.loads(RECORD.read_text())["figures"]))
