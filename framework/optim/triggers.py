"""When a matrix' frame is chosen again: update_proj_gap in GaLore's code."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lightspan.errors import UserError


class Trigger(ABC):
    """Decides on the host which matrices are due."""

    @abstractmethod
    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float]) -> list[int]:
        """Those of the matrices `asked`, positions in a stack, whose frame is to be chosen again now; a matrix' first
        step is not asked about.

        Args:
            steps: optimiser steps that each matrix of the stack has taken.
            phases: in [0, 1), spread over all matrices of the optimiser, so that they need not all be due at once.
        """


@dataclass(frozen=True)
class Every(Trigger):
    """A fixed number of steps after the last refresh.

    Args:
        steps: >= 1.
        staggered: whether matrices take turns, so that no single step does all of them: the k-th of n changes its
            frame first after k / n of `steps`. Published code changes all frames in the same step.
    """

    steps: int = 50
    staggered: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"refresh={self.steps} must be at least 1 step")

    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float]) -> list[int]:
        shift = self.steps if self.staggered else 0
        return [i for i in asked if (steps[i] - int(phases[i] * shift)) % self.steps == 0]
