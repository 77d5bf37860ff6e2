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
    """`did you mean x?`, or nothing if no known name is similar, nor the other's initials (`learning_rate`, `lr`)."""
    names = [str(item) for item in known]
    near = [one for one in names if one.casefold() == str(name).casefold()]  # `Lora`, LoRA
    near = near or difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    near = near or [one for one in names if str(name) == _initials(one) or _initials(str(name)) == one]
    return f"did you mean {near[0]}? " if near else ""


def _initials(name: str) -> str | None:
    """`lr` of `learning_rate`; None of a name of one word."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else None
