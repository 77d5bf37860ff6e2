"""The one exception that means: the user can fix this; and how foreign text is made safe to print."""

import sys
import unicodedata
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one readable paragraph: the thing, its value, the limit, the way out.

    The command line prints only the message and exits with status 2; a traceback appears only with --debug.
    """


def printable(text: str) -> str:
    """The text with every control character except line breaks and tabs escaped (`\\x1b`). Spaces of any width stay.

    Names, settings and answers of servers come from others, and a terminal obeys control characters in them.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def _is_plain(letter: str) -> bool:
    return letter in "\n\t" or letter.isprintable() or unicodedata.category(letter) == "Zs"


def one_line(text: object) -> str:
    """`printable` for text inside a sentence: line breaks and tabs are escaped too."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def first_lines(error: BaseException, count: int = 1) -> str:
    """What a library says of its failure, without the pages that follow: the first lines as one, of at most 200
    characters each, or the kind of an error that says nothing.
    """
    lines = str(error).strip().splitlines()[:count] or [type(error).__name__]
    return " ".join(one_line(line.strip())[:200] for line in lines)


def install_extra(name: str) -> str:
    """How to install one of lightspan's extras, which no package index has: see README."""
    return f"pip install '.[{name}]' in a checkout of lightspan"


class WarningNote(str):
    """A note on something that the user may not have meant: it changes what is computed."""


def print_notes(notes: Iterable[str]) -> None:
    """Prints what a user should know and need not mend, to stderr so that printed YAML stays YAML. Warnings come last,
    where they are seen.
    """
    for note in sorted(notes, key=lambda note: isinstance(note, WarningNote)):
        print(printable(f"{'warning' if isinstance(note, WarningNote) else 'note'}: {note}"), file=sys.stderr)
