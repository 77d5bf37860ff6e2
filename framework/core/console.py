"""The console on which tables and progress are shown.

Names of runs, tensors, metrics and settings come from others, and a terminal obeys control characters in them: here
they are escaped, wherever they stand in a table. What is printed without rich goes through `printable`.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from lightspan.core.errors import printable


class SafeConsole(Console):
    """rich's console, on which text cannot control the terminal; rich itself does so as before."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            is_plain = segment.control or segment.text.isprintable()
            yield segment if is_plain else Segment(printable(segment.text), segment.style)
