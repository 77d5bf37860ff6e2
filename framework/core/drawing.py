"""One look for every picture: colours, a canvas, and PNG bytes. matplotlib loads only when something is drawn."""

import functools
import textwrap
import warnings
from io import BytesIO
from typing import Any

COLOURS = ("#1f5fd0", "#d1560f", "#0c8065", "#a3278f", "#7a6500", "#5a49b8")
"""One a line; each is dark enough to read as text on white."""
_BEYOND_LATIN = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "Hiragino Sans", "PingFang SC", "Microsoft YaHei"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Bengali", "Arial Unicode MS", "Unifont"),
)
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
    """The figure as PNG bytes. Software and date are left out, so that equal pictures are equal bytes.

    Every text is shown as it is: a name with two dollars is no formula, which only numbers on logarithmic axes are.
    Letters that matplotlib's own font lacks, such as those of a class called 猫, are drawn with a font of this machine
    that has them, and escaped where none has: \\u732b.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if not isinstance(axis.get_major_formatter(), LogFormatter):
            for label in axis.get_ticklabels():
                label.set_parse_math(False)
    for text in figure.findobj(Text):
        if text.get_parse_math():
            text.set_text(text.get_text().replace("$", r"\$"))
        if not text.get_text().isascii():
            shown, families = with_letters(text.get_text())
            text.set(text=shown, fontfamily=families)
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a label that matplotlib makes as it draws
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def with_letters(text: str) -> tuple[str, list[str]]:
    """(the text, its letters without a font escaped; the families that have the others, matplotlib's own first)."""
    fonts = _fonts()
    known = frozenset[int]().union(*(letters for _, letters in fonts))
    shown = "".join(c if c.isspace() or ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    return shown, [family for family, _ in fonts]


@functools.cache
def _fonts() -> list[tuple[str, frozenset[int]]]:
    """(family, letters) of matplotlib's own font, and of those of `_BEYOND_LATIN` that this machine has."""
    from matplotlib.font_manager import fontManager, get_font

    there = {font.name: font.fname for font in fontManager.ttflist}
    return [
        (family, frozenset(get_font(there[family]).get_charmap()))
        for family in ("DejaVu Sans", *_BEYOND_LATIN)
        if family in there
    ]
