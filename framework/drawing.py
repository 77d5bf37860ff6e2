"""One look for every picture: colours, a canvas, and PNG bytes. matplotlib loads only when something is drawn."""

import textwrap
from io import BytesIO
from typing import Any

COLOURS = ("#1f5fd0", "#d1560f", "#0c8065", "#a3278f", "#7a6500", "#5a49b8")
"""One a line; each is dark enough to read as text on white."""
SOFT, GRID = "#5b6470", "#e9ebee"


def canvas(
    title: str, size: tuple[float, float] = (6.4, 3.8), panels: tuple[int, int] = (1, 1), **grid: Any
) -> tuple[Any, Any]:
    """A figure of `size` inches (width, height), and its axes as an array [rows, columns].

    Args:
        title: wrapped to the width; "" for none.
        panels: (rows, columns).
        grid: what `Figure.subplots` takes besides, such as `width_ratios` or `sharey`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    if title:
        lines = textwrap.fill(title, int(10 * size[0]))  # a number of characters that always fits the width
        figure.suptitle(lines, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure, figure.subplots(*panels, squeeze=False, **grid)


def tidy(axes: Any) -> None:
    """A quiet grid behind the data, and no frame above and to the right."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """The figure as PNG bytes. Software and date are left out, so that equal pictures are equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
