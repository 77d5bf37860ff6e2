"""The validation curves as a PNG, for a README or a paper draft."""

import io
from collections.abc import Sequence

from lightspan.errors import UserError
from lightspan.report.curves import LARGEST, finite
from lightspan.report.runs import Run
from lightspan.report.sections import group_of, unit_of

_COLOURS = ("#1f5fd0", "#d1560f", "#0c8065", "#a3278f", "#7a6500", "#5a49b8")


def picture(runs: Sequence[Run], title: str) -> bytes:
    """PNG bytes (150 dpi): the first validation metric over steps and, if all runs have it, the optimiser state.

    Raises: UserError if no run logged a validation metric.
    """
    metric = next((name for run in runs for name in run.metrics() if group_of(name) == "val"), None)
    if metric is None:
        raise UserError(
            f"--png draws validation curves, but none of {', '.join(run.name for run in runs)} logged a val/ metric; "
            "leave --png out, or train with trainer.val_check_interval"
        )
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    states = [run.summary.get("optimizer_state_mib") for run in runs]
    with_states = len(runs) > 1 and all(isinstance(state, int | float) and abs(state) <= LARGEST for state in states)
    figure = Figure(figsize=(8.4, 3.6) if with_states else (6.4, 3.8), dpi=150, layout="constrained", facecolor="white")
    left, *right = figure.subplots(
        1, 2 if with_states else 1, width_ratios=[2.6, 1] if with_states else None, squeeze=False
    )[0]
    for at, run in enumerate(runs):
        points = finite([(point.step, point.value) for point in run.points(metric)])
        left.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_COLOURS[at % len(_COLOURS)],
            linestyle="-" if at < len(_COLOURS) else "--",
            marker="o" if len(points) <= 40 else None,
            markersize=3.5,
            linewidth=1.8,
            label=run.name,
        )
    left.set(xlabel="optimiser steps", ylabel=f"{metric} ({unit_of(metric)})" if unit_of(metric) else metric)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    for panel in right:
        names = [run.name for run in runs]
        bars = panel.barh(names, states, color=[_COLOURS[at % len(_COLOURS)] for at in range(len(runs))], height=0.55)
        panel.bar_label(bars, fmt="%.1f", padding=4)
        panel.invert_yaxis()
        panel.margins(x=0.3, y=0.25)
        panel.set(xlabel="optimiser state (MiB)")
    for panel in (left, *right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color("#8a929c")
        panel.tick_params(color="#8a929c", labelcolor="#3a4149")
    left.grid(color="#e9ebee", linewidth=0.8)
    left.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    buffer = io.BytesIO()
    # Software and date are left out, so that equal runs give equal bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
