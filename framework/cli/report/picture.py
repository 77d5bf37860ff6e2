"""The validation curves as a PNG, for a README or a paper draft."""

from collections.abc import Sequence

from lightspan.cli.report.curves import LARGEST, finite
from lightspan.cli.report.runs import Run
from lightspan.cli.report.sections import group_of, unit_of
from lightspan.core.drawing import COLOURS, canvas, png, tidy
from lightspan.core.errors import UserError


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
    from matplotlib.ticker import MaxNLocator

    states = [run.summary.get("optimizer_state_mib") for run in runs]
    with_states = len(runs) > 1 and all(isinstance(state, int | float) and abs(state) <= LARGEST for state in states)
    figure, ((left, *right),) = (
        canvas(title, (8.4, 3.6), (1, 2), width_ratios=[2.6, 1]) if with_states else canvas(title)
    )
    for at, run in enumerate(runs):
        points = finite([(point.step, point.value) for point in run.points(metric)])
        left.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=COLOURS[at % len(COLOURS)],
            linestyle="-" if at < len(COLOURS) else "--",
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
        bars = panel.barh(names, states, color=[COLOURS[at % len(COLOURS)] for at in range(len(runs))], height=0.55)
        panel.bar_label(bars, fmt="%.1f", padding=4)
        panel.invert_yaxis()
        panel.margins(x=0.3, y=0.25)
        panel.set(xlabel="optimiser state (MiB)")
        tidy(panel)
        panel.grid(visible=False)  # the bars carry their numbers
    tidy(left)
    return png(figure)
