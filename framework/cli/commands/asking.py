"""A yes of whoever sits at the terminal."""

import sys

from lightspan.core.errors import UserError, printable


def agreed(question: str) -> bool:
    """Whether the answer is yes. Raises: UserError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody can be asked, since standard input is no terminal; say it with --yes")
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
