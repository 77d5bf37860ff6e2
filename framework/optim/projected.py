"""Which parameters of a group are projected: one rule for the optimiser, and for code that asks before there is one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightspan.errors import UserError
from lightspan.optim.bases import Basis
from lightspan.optim.layout import is_matrix, matrix_shape
from lightspan.patterns import matches
from lightspan.sharded import ranks_of, split_axis


@dataclass(frozen=True)
class Selection:
    """What one parameter group and its optimiser allow to be projected.

    Args:
        project: that of the group: True, False, or patterns of names.
        rank: that of the group.
        backward: "whole", "hooks" or "projected", see `LowRank`.
        basis: that of the optimiser, which says what it takes.
        heads: those of the group, by name, if the rule wants to know them.
    """

    project: bool | Sequence[str]
    rank: int
    backward: str
    basis: Basis
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def allows(self, name: str) -> bool:
        """Whether the group's `project` lets a parameter of this name be projected, whatever its shape."""
        return self.project if isinstance(self.project, bool) else matches(name, self.project)

    def stacked(self, parameter: Tensor) -> bool:
        """Whether a parameter [E out in] counts as E matrices, like the experts of a layer: each of them is larger
        than the rank on both sides. The kernels of one-dimensional convolutions are shorter.
        """
        return parameter.ndim == 3 and len(parameter) > 0 and min(parameter.shape[1:]) > self.rank

    def side(self, parameter: Tensor) -> int:
        """The shorter side of the parameter's matrix, or of each matrix in its stack."""
        return min(parameter.shape[1:]) if self.stacked(parameter) else matrix_shape(parameter)[1]

    def width(self, parameter: Tensor) -> int:
        """Coordinates per row of the parameter's matrix, or of each in its stack; 0 if the basis does not take it."""
        return self.basis.width(self.side(parameter), self.rank)

    def heads_of(self, parameter: Tensor, name: str) -> tuple[int, ...]:
        """How many rows belong to each head, see `Layout`; empty if that is not known.

        Raises: UserError for heads that are not the rows of this parameter.
        """
        heads = tuple(self.heads.get(name, ()))
        if heads and (parameter.ndim != 2 or sum(heads) != len(parameter)):
            raise UserError(
                f"the group's heads of {name} have {' + '.join(map(str, heads))} rows, but its shape is "
                f"{tuple(parameter.shape)}; name the rows of every head, or leave it out"
            )
        return heads

    def projects(self, parameter: Tensor, name: str) -> bool:
        """Whether a parameter's state lives in a subspace."""
        if not is_matrix(parameter) or not self.allows(name):
            return False
        if self.stacked(parameter):
            return self.backward == "whole" and _has_whole_slices(parameter)
        return self.width(parameter) > 0


def _has_whole_slices(stack: Tensor) -> bool:
    """Whether no matrix of a stack [E out in] is split among ranks."""
    ranks = ranks_of(stack)
    return ranks is None or split_axis(stack, ranks) == 0


def require_some_projected(owner: str, candidates: Sequence[tuple[Tensor, str, Selection]]) -> None:
    """Raises: UserError if nothing would be projected.

    Args:
        owner: the optimiser's class.
        candidates: matrices that their groups allow to be projected, with their names and their groups' selections.
    """
    if any(selection.projects(parameter, name) for parameter, name, selection in candidates):
        return
    if not candidates:
        raise UserError(
            f"{owner} got no matrix to project: pass real parameters with two or more axes in a group with "
            "project=True, or set project=False in all groups to use AdamW"
        )
    flat = [(s.side(p), s.rank) for p, _, s in candidates if not s.stacked(p)]
    if not flat:
        raise UserError(
            f"{owner} got no matrix to project except stacks [experts out in], which need gradients of whole matrices; "
            "set backward='whole', split them along their first axis, or use AdamW"
        )
    side, rank = max(flat)
    way_out = f"choose a rank from 1 to {side - 1}, or use AdamW" if side > 1 else "use AdamW"
    raise UserError(
        f"rank={rank} is not below the shorter side of any matrix (the largest is {side}), so nothing would be "
        f"projected; {way_out}"
    )
