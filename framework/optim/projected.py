"""Which parameters of a group are projected: one rule for the optimiser, and for who asks before there is one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightspan.optim.layout import is_matrix, matrix_shape
from lightspan.optim.ranks import RankByEnergy
from lightspan.patterns import matches


@dataclass(frozen=True)
class Selection:
    """What one parameter group, and the optimiser that it is in, let be projected.

    Args:
        project: the group's: True, False, or patterns of names.
        rank: the group's; of ranks chosen by energy the largest.
        by_energy: what chooses a rank for each matrix, if anything does.
        backward: "whole", "hooks" or "projected", see `LowRank`.
    """

    project: bool | Sequence[str]
    rank: int
    by_energy: RankByEnergy | None
    backward: str

    def allows(self, name: str) -> bool:
        """Whether the group's `project` lets a parameter of this name be projected, its shape aside."""
        return self.project if isinstance(self.project, bool) else matches(name, self.project)

    def stacked(self, parameter: Tensor) -> bool:
        """Whether a parameter [E out in] counts as E matrices, as the experts of a layer are: each of them is larger
        than the rank on both sides. The kernels of one-dimensional convolutions are shorter.
        """
        return parameter.ndim == 3 and len(parameter) > 0 and min(parameter.shape[1:]) > self.rank

    def side(self, parameter: Tensor) -> int:
        """The shorter side of the parameter's matrix, or of each matrix in its stack."""
        return min(parameter.shape[1:]) if self.stacked(parameter) else matrix_shape(parameter)[1]

    def projects(self, parameter: Tensor, name: str, rank: int | None = None) -> bool:
        """Whether a parameter's state lives in a subspace.

        Args:
            rank: the parameter's; None asks about the smallest that it can get.
        """
        if not is_matrix(parameter) or not self.allows(name):
            return False
        if self.stacked(parameter):
            whole = self.backward == "whole" and self.by_energy is None
            return whole and not isinstance(parameter, DTensor)
        return (self.least if rank is None else rank) < self.side(parameter)

    @property
    def least(self) -> int:
        """The smallest rank that a matrix can get."""
        return self.rank if self.by_energy is None else self.by_energy.least
