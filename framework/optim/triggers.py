"""When a matrix' frame is chosen again (update_proj_gap in GaLore's code): by steps, or when it captures too little
of the gradient.

Shapes: B matrices, M rows, R rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightspan.distributed import agreed
from lightspan.errors import UserError
from lightspan.optim.layout import Layout, State
from lightspan.optim.sharding import Total, alone


class Trigger(ABC):
    """Decides on the host which matrices are due; what it measures on the device is part of the state."""

    needs_energy = False
    """Whether `observe` reads the row norms of the gradients."""

    def initial(self, layout: Layout) -> State:
        """State before the first step."""
        return {}

    @abstractmethod
    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float], state: State) -> list[int]:
        """Those of the matrices `asked`, positions in a stack, whose frame is to be chosen again now; a matrix' first
        step is not asked about.

        Args:
            steps: optimiser steps that each matrix of the stack has taken.
            phases: in [0, 1), spread over all matrices of the optimiser, so that they need not all be due at once.
            state: that of the whole stack.
        """

    def observe(
        self,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        refreshed: slice | Tensor | None,
        state: State,
        total: Total = alone,
    ) -> None:
        """Called in every step if `needs_energy`; `refreshed` are the positions whose frame is new, and `total` extends
        sums over rows to those of other ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} measures nothing")


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

    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float], state: State) -> list[int]:
        shift = self.steps if self.staggered else 0
        return [i for i in asked if (steps[i] - int(phases[i] * shift)) % self.steps == 0]


@dataclass(frozen=True)
class WhenCapturedFalls(Trigger):
    """When the share of the gradient's energy inside the frame falls below `below` times its value after the last
    refresh. Frames of matrices whose gradients stay in one subspace live long, others are often chosen again.

    The share is a running mean over about ten steps, measured on rank 0, so that all ranks refresh in the same
    step. The device is read once in `check` steps for all matrices of one shape.

    Args:
        below: in (0, 1).
        check: steps between two checks, >= 1.
        at_most: steps after which a frame is chosen again whatever it captures, >= check.
    """

    below: float = 0.7
    check: int = 10
    at_most: int = 500

    needs_energy = True
    _KEPT = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.below < 1:
            raise UserError(f"WhenCapturedFalls below={self.below} must be in (0, 1)")
        if not 1 <= self.check <= self.at_most:
            raise UserError(
                f"WhenCapturedFalls needs 1 <= check <= at_most, got check={self.check}, at_most={self.at_most}"
            )

    def initial(self, layout: Layout) -> State:
        return {key: layout.zeros() for key in ("captured", "captured_first", "frame_age")}

    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float], state: State) -> list[int]:
        asked = [i for i in asked if (steps[i] + int(phases[i] * self.check)) % self.check == 0]
        if not asked:
            return []
        fallen = (
            (state["captured"] < self.below * state["captured_first"]) | (state["frame_age"] >= self.at_most)
        ).tolist()
        return [i for i in asked if fallen[i]]

    def observe(
        self,
        coordinates_BMR: Tensor,
        energy_BM: Tensor,
        refreshed: slice | Tensor | None,
        state: State,
        total: Total = alone,
    ) -> None:
        inside_B = total(coordinates_BMR.square().sum(dim=(1, 2)))
        share_B = agreed(inside_B / total(energy_BM.sum(dim=1)).clamp_min(1e-30))
        state["captured"].lerp_(share_B, 1 - self._KEPT)
        state["frame_age"].add_(1)
        if refreshed is not None:
            for key in ("captured", "captured_first"):
                state[key][refreshed] = share_B[refreshed]
            state["frame_age"][refreshed] = 1
