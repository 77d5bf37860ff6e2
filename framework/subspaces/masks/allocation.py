"""How the open entries of a density are shared out over the tensors of a network.

Source of Erdős-Rényi-Kernel: Evci et al. 2020, arXiv 1911.11134, section 3 (1), after Mocanu et al. 2018.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightspan.subspaces.masks.top_k import count_at, require_density, top_k_of_all

Shapes = Mapping[str, Sequence[int]]


class Allocation(ABC):
    """Which tensors compete for which number of open entries."""

    @abstractmethod
    def groups(self, shapes: Shapes, density: float) -> list[tuple[tuple[str, ...], int]]:
        """(names of tensors that share one ranking, open entries of all of them together), every tensor once."""

    def choose(self, scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
        """Masks, bool, of the highest scores."""
        shapes = {name: one.shape for name, one in scores.items()}
        chosen: dict[str, Tensor] = {}
        for names, count in self.groups(shapes, density):
            chosen |= top_k_of_all({name: scores[name] for name in names}, count)
        return {name: chosen[name] for name in scores}


class AllTogether(Allocation):
    """One ranking of all entries of all tensors; a tensor can lose every entry. The total count is exact."""

    def groups(self, shapes: Shapes, density: float) -> list[tuple[tuple[str, ...], int]]:
        return [(tuple(shapes), count_at(density, sum(math.prod(shape) for shape in shapes.values())))]


class PerTensorAllocation(Allocation):
    """A ranking within each tensor, which has a count of its own."""

    @abstractmethod
    def counts(self, shapes: Shapes, density: float) -> dict[str, int]:
        """Open entries of each tensor; at least one of each that has any."""

    def groups(self, shapes: Shapes, density: float) -> list[tuple[tuple[str, ...], int]]:
        return [((name,), count) for name, count in self.counts(shapes, density).items()]


class Uniform(PerTensorAllocation):
    """The same density for every tensor."""

    def counts(self, shapes: Shapes, density: float) -> dict[str, int]:
        return {name: count_at(density, math.prod(shape)) for name, shape in shapes.items()}


class ErdosRenyi(PerTensorAllocation):
    """Erdős-Rényi-Kernel: the density of a tensor is proportional to (sum of its axes) / (product of its axes), and 1
    at most, so small tensors stay denser.
    """

    def counts(self, shapes: Shapes, density: float) -> dict[str, int]:
        require_density(density)
        numbers = {name: math.prod(shape) for name, shape in shapes.items()}
        ratio = {name: sum(shape) / max(numbers[name], 1) if shape else 1.0 for name, shape in shapes.items()}
        full: set[str] = set()
        while True:
            # The factor with which the tensors that are not full make up what the full ones leave.
            wanted = density * sum(numbers.values()) - sum(numbers[name] for name in full)
            others = sum(ratio[name] * numbers[name] for name in shapes if name not in full)
            factor = max(wanted, 0.0) / others if others else 0.0
            more = {name for name in shapes if name not in full and factor * ratio[name] > 1}
            if not more:
                break
            full |= more
        share = {name: 1.0 if name in full else factor * ratio[name] for name in shapes}
        return {name: min(numbers[name], max(1, int(share[name] * numbers[name] + 0.5))) for name in shapes}
