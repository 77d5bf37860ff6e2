"""The name that was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object]) -> str:
    """`did you mean x?`, or nothing if no known name is similar in any case, nor the other's initials
    (`learning_rate`, `lr`).
    """
    names = {str(item).casefold(): str(item) for item in known}
    text = str(name).casefold()
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.6)
    near = near or [one for one in names if text == _initials(one) or _initials(text) == one]
    return f"did you mean {names[near[0]]}? " if near else ""


def _initials(name: str) -> str | None:
    """`lr` of `learning_rate`; None of a name of one word."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else None
