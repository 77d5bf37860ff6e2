"""Coefficients that are learned: one a task, one a task and tensor, or one for each random group of a tensor's entries.

Each is a module that says what c of the equation in `lightspan.merging.span` is for a tensor.

Shapes: L tensors, K tasks, P groups of a tensor's entries, S shape of a tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.subspaces.masks.draws import uniform

Wise = Literal["task", "layer"]


class Learned(nn.Module, ABC):
    """Coefficients of named tensors."""

    weight: nn.Parameter

    @abstractmethod
    def of(self, name: str, weight: Tensor | None = None) -> Tensor:
        """c of a tensor: [K], or [K S]; of numbers in place of `self.weight` where such are given."""


class TaskWise(Learned):
    """One number a task for all tensors.

    Args:
        shapes: of the tensors by name.
        tasks: K.
        start: of each.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], tasks: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((tasks,), start))

    def of(self, name: str, weight: Tensor | None = None) -> Tensor:
        return self.weight if weight is None else weight


class LayerWise(Learned):
    """One number a task and tensor; arguments as of `TaskWise`."""

    def __init__(self, shapes: Mapping[str, torch.Size], tasks: int, start: float) -> None:
        super().__init__()
        self._row = {name: row for row, name in enumerate(shapes)}
        self.weight = nn.Parameter(torch.full((len(shapes), tasks), start))

    def of(self, name: str, weight: Tensor | None = None) -> Tensor:
        return (self.weight if weight is None else weight)[self._row[name]]


def wise_as(wise: Wise, shapes: Mapping[str, torch.Size], tasks: int, start: float) -> Learned:
    """Coefficients of each "task", or of each task and "layer"; the other arguments as of `TaskWise`.

    Raises: UserError for another word.
    """
    if wise not in ("task", "layer"):
        raise UserError(f"wise={wise!r} must be task or layer")
    return (TaskWise if wise == "task" else LayerWise)(shapes, tasks, start)


class Partitioned(Learned):
    """P numbers a task and tensor, one for each of P groups that the tensor's entries are dealt into at random.

    Source: aTLAS x K of arXiv 2407.02880, section 6.2 (its K is P here). The groups are a function of (seed, tensor
    name), so that tensors of one shape have groups of their own, and vectors are grouped as matrices are; the authors'
    code shares groups by shape and leaves everything that is not a matrix without a change.

    Args:
        shapes, tasks, start: as of `TaskWise`.
        groups: P, at least 1; with 1 it is `LayerWise`.
        seed: of the groups.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], tasks: int, start: float, groups: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        if groups < 1:
            raise UserError(f"groups={groups} must be at least 1: the parts that a tensor's entries are dealt into")
        self._row = {name: row for row, name in enumerate(shapes)}
        self._shapes, self._seed, self.groups = dict(shapes), seed, groups
        self.weight = nn.Parameter(torch.full((len(shapes), groups, tasks), start))

    def of(self, name: str, weight: Tensor | None = None) -> Tensor:
        c_PK = (self.weight if weight is None else weight)[self._row[name]]
        return c_PK[0] if self.groups == 1 else c_PK.mT[:, self.group_of(name)]

    def group_of(self, name: str) -> Tensor:
        """The group of each entry, int64 [S]: drawn anew each time, which costs less memory than it would to keep."""
        u_S = uniform(self._seed, 0, f"groups of {name}", self._shapes[name], device=self.weight.device)
        return (u_S * self.groups).long().clamp_max(self.groups - 1)
