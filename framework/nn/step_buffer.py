"""What the micro-batches of a step leave for what follows it: rows for a queue, a memory, a centre."""

from typing import Generic, TypeVar

T = TypeVar("T")


class StepBuffer(Generic[T]):
    """Keeps what is added in a step until it is taken, after the step. What a step added that was not taken, as when a
    gradient is infinite, is forgotten: numbers that are not finite would stay in a queue or a mean for good.

    It is no part of the state: a run is saved between steps.
    """

    def __init__(self) -> None:
        self._step = 0
        self._kept: list[T] = []

    def add(self, thing: T, step: int = 0) -> None:
        """Keeps what a micro-batch of this step gave; what an earlier step left is forgotten."""
        if step != self._step:
            self._kept.clear()
            self._step = step
        self._kept.append(thing)

    def take(self) -> list[T]:
        """All that was added since, in order; nothing is kept."""
        taken, self._kept = self._kept, []
        return taken
