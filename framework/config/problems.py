"""One thing wrong with a configuration, and the name that was probably meant."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong, where it was written and under which key."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where} {self.key}: {self.message}"


def nearest(name: object, known: Iterable[object]) -> str:
    """`did you mean x?`, or nothing if no known name is similar."""
    near = difflib.get_close_matches(str(name), [str(item) for item in known], n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""
