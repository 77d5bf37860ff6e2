"""A part of the comparison at a length at which methods work: few methods on the transformer, all of Fashion-MNIST,
ten times as many steps, a search that is widened until no best is at its edge, and curves over steps.
"""

import math
from collections.abc import Sequence

from evidence.zoo import records
from evidence.zoo.records import OURS, RATES, SEARCH_SEED, SEEDS, THEIRS, UNTRAINED, Cell, Row
from evidence.zoo.table import PROBES, Spread, listed, markdown, noise_of, shown, spread_of
from lightspan.core.drawing import COLOURS, SOFT, canvas, png, tidy

DATA, NAME, ENCODER = "full", "Fashion-MNIST, all 70,000 pictures", "ViT"
STEPS, LOOKS = 2000, 5
LABELS = "classifier"
ARMS = {OURS: (LABELS, "SimCLR", "BYOL", "DINO", "MAE", "I-JEPA"), THEIRS: ("SimCLR", "DINO", "MAE")}
GRID = (1e-4, 3e-4, *RATES, 3e-2, 1e-1)
"""The search begins with `RATES`, its middle, and goes outwards from a best that is at its edge."""
FIGURE = records.RESULTS.with_name("zoo_curves.png")
COMMAND = 'make zoo ARGS="--data full"'


def looks(steps: int) -> list[int]:
    """The steps after which a run is scored: its last, and half, a quarter... of them."""
    return sorted({steps >> half for half in range(LOOKS)} - {0})


def searched(rows: Sequence[Row], by: str, arm: str) -> dict[float, float]:
    """The score of each rate that was tried."""
    of = Cell(by, arm, DATA, ENCODER, 0.0, SEARCH_SEED)
    return {
        row["rate"]: records.score(row) for row in records.cells(rows) if records.cell_of(row)._replace(rate=0.0) == of
    }


def best(found: dict[float, float]) -> float:
    """The rate of the highest score, the smallest of equal ones."""
    return max(sorted(found), key=found.__getitem__)


def wanted(found: dict[float, float]) -> list[float]:
    """The rates to try next; none once the best has a worse one, or the end of `GRID`, on either side."""
    if left := [rate for rate in RATES if rate not in found]:
        return left
    at = GRID.index(best(found))
    return [rate for rate in GRID[max(at - 1, 0) : at + 2] if rate not in found]


def searches(rows: Sequence[Row]) -> list[Cell]:
    """Cells that the search still needs, as far as its rows tell."""
    return [
        Cell(by, arm, DATA, ENCODER, rate, SEARCH_SEED)
        for by, arms in ARMS.items()
        for arm in arms
        for rate in wanted(searched(rows, by, arm))
    ]


def reports(rows: Sequence[Row]) -> list[Cell]:
    """Cells that the page reports, seed by seed; none of a method whose search is not complete."""
    plan = [Cell(OURS, UNTRAINED, DATA, ENCODER, 0.0, -1)]
    for by, arms in ARMS.items():
        for arm in arms:
            found = searched(rows, by, arm)
            if not wanted(found):
                plan.append(Cell(by, arm, DATA, ENCODER, best(found), -1))
    return [cell._replace(seed=seed) for seed in SEEDS for cell in plan]


def reported(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (package, method) that are measured."""
    cells = {*reports(rows)}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in records.cells(rows):
        if records.cell_of(row) in cells:
            found.setdefault((row["by"], row["arm"]), []).append(row)
    return found


def spreads(of: dict[tuple[str, str], list[Row]], figure: str) -> dict[tuple[str, str], Spread]:
    """Of the runs that did not diverge."""
    found = {key: spread_of([row[figure] for row in each if figure in row]) for key, each in of.items()}
    return {key: spread for key, spread in found.items() if spread is not None}


def compared(rows: Sequence[Row], of: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    """A row of the table for each method."""
    figures = {figure: spreads(of, figure) for figure in PROBES}
    start = (OURS, UNTRAINED)
    lines = []
    for by, arm in of:
        tried = searched(rows, by, arm)
        cells = [f"{arm} (labels)" if arm == LABELS else arm, by if tried else ""]
        cells += [f"{best(tried):g} of {listed([f'{rate:g}' for rate in sorted(tried)])}" if tried else ""]
        for found in figures.values():
            above = f"{found[by, arm].mean - found[start].mean:+.1f}" if tried and start in found else ""
            cells += [str(found[by, arm]), above] if (by, arm) in found else ["diverged", ""]
        times = [row["step_ms"] for row in of[by, arm] if row.get("step_ms") is not None]
        lines.append([*cells, shown(sorted(times)[len(times) // 2] if times else None, ".0f")])
    return lines


def reading(rows: Sequence[Row], of: dict[tuple[str, str], list[Row]]) -> list[str]:
    """Which methods are above the untrained encoder by more than the noise, and which search ended at an end."""
    lines = []
    for figure, probe in PROBES.items():
        found = spreads(of, figure)
        noise = noise_of([*found.values()])
        if noise is None or (OURS, UNTRAINED) not in found:
            continue
        start = found.pop((OURS, UNTRAINED))
        above = [key for key, spread in found.items() if spread.mean > start.mean + noise]
        others = [f"{arm} ({by})" for by, arm in found if (by, arm) not in above]
        text = f"- **{probe}** (noise {noise:.1f} points): {len(above)} of {len(found)} are above the untrained "
        text += f"encoder's {start.mean:.1f}" + (f"; not so {listed(others)}" if others else "")
        peers = []
        for by, arm in found:
            if by == THEIRS and (OURS, arm) in found:
                gap = found[OURS, arm].mean - found[by, arm].mean
                peers.append(f"{arm} {gap:+.1f}" + (" (within noise)" if abs(gap) <= noise else ""))
        lines.append(text + (f". lightspan less lightly: {listed(peers)}." if peers else "."))
    ends = [
        f"{arm} ({by})" for by, arm in of if (tried := searched(rows, by, arm)) and best(tried) in (GRID[0], GRID[-1])
    ]
    return [*lines, *([f"- The best rate is at an end of the grid: {listed(ends)}."] if ends else []), ""]


def section(rows: Sequence[Row]) -> list[str]:
    """Of the page."""
    of = reported(rows)
    lines = ["## At a length at which methods work", ""]
    left = [*searches(rows), *(cell for cell in reports(rows) if cell not in records.done(rows))]
    missing = [f"{len(left)} runs or more are not measured yet; `{COMMAND}` adds them.", ""] if left else []
    if not any(key != (OURS, UNTRAINED) for key in of):
        return [*lines, *missing]
    steps = max(row["steps"] for each in of.values() for row in each)
    return [
        *lines,
        f"{NAME}, {steps:,} steps, and fewer methods, on the transformer alone. A teacher takes time to become better "
        "than its student, and hidden patches are learned slowly, so the shorter runs above say little about such "
        "methods. Everything else is as above, except for the search, which begins with "
        f"{listed([f'{rate:g}' for rate in RATES])} and continues outwards while the best rate is the lowest or the "
        f"highest that was tried. Rates are chosen on validation pictures. `{COMMAND}` measures it.",
        "",
        *markdown(
            ["method", "package", "rate", *(part for probe in PROBES.values() for part in (probe, "gained")), "ms"],
            compared(rows, of),
        ),
        *reading(rows, of),
        f"![Accuracy over steps](../evidence/results/{FIGURE.name})",
        "",
        *missing,
    ]


def figure(rows: Sequence[Row]) -> bytes:
    """A panel a probe: the mean over seeds after each of the steps that a run was scored at, and where it began."""
    of = reported(rows)
    drawn, axes_P = canvas("Probes of frozen features over steps", (9.6, 4.2), (1, len(PROBES)))
    colours = dict(zip(dict.fromkeys(arm for arms in ARMS.values() for arm in arms), COLOURS, strict=True))
    for place, (probe, label) in enumerate(PROBES.items()):
        axes = axes_P[0, place]
        starts = spreads(of, probe)
        if (OURS, UNTRAINED) in starts:
            axes.axhline(starts[OURS, UNTRAINED].mean, color=SOFT, linewidth=0.8, linestyle=":", label="untrained")
        for (by, arm), each in of.items():
            curves = [row["curve"] for row in each if row.get("curve")]
            if curves:
                steps = [point["step"] for point in curves[0]]
                means = [math.fsum(point[probe] for point in at) / len(at) for at in zip(*curves, strict=True)]
                style = "-o" if by == OURS else "--s"
                name = f"{arm} ({'labels' if arm == LABELS else by})"
                axes.plot(steps, means, style, color=colours[arm], markersize=3, linewidth=1.2, label=name)
        axes.set_xscale("log")
        axes.set_xticks(looks(STEPS), [str(step) for step in looks(STEPS)])
        axes.minorticks_off()
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_xlabel("steps", fontsize=8)
        axes.set_ylabel("correct, %", fontsize=8)
        axes.tick_params(labelsize=8)
        tidy(axes)
    axes_P[0, -1].legend(fontsize=7)
    return png(drawn)
