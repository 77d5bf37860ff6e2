"""Texts of others in HTML and SVG."""

import html

from lightspan.core.errors import printable


def escape(text: str) -> str:
    """The text for a place between tags or inside of a quoted attribute: no tag, and no control character, which turns
    the direction of what follows it or is obeyed by a terminal that shows the file.
    """
    return html.escape(printable(text))
