"""One thing wrong with a configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong, where it was written and under which key."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where} {self.key}: {self.message}"
