"""Which parameters of a group are projected: one rule for the optimiser, and for code that asks before there is one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightspan.core.errors import UserError
from lightspan.core.patterns import matches
from lightspan.core.sharded import ranks_of, split_axis
from lightspan.optim.matrices.shapes import is_matrix, matrix_shape


@dataclass(frozen=True, eq=False)
class Selection:
    """What a parameter's group and its optimiser allow.

    Args:
        name: of the parameter; empty if its group has no names.
        project, stacks: those of the group, True, False, or patterns of names; see `LowRank`.
        rank: that of the group; None of an optimiser that steps whole matrices.
        backward: "whole", "hooks" or "projected", see `LowRank`.
    """

    parameter: Tensor
    name: str
    project: bool | Sequence[str]
    stacks: bool | Sequence[str]
    rank: int | None
    backward: str

    @property
    def allowed(self) -> bool:
        """Whether the group's `project` lets the parameter be projected, whatever its shape."""
        return setting_applies(self.project, self.name)

    @property
    def stacked(self) -> bool:
        """Whether a parameter [E out in] counts as E matrices, like the experts of a layer."""
        return self.parameter.ndim == 3 and len(self.parameter) > 0 and setting_applies(self.stacks, self.name)

    @property
    def side(self) -> int:
        """The shorter side of the parameter's matrix, or of each matrix in its stack."""
        return min(self.parameter.shape[1:]) if self.stacked else matrix_shape(self.parameter)[1]

    @property
    def width(self) -> int:
        """Coordinates per row of the parameter's matrix, or of each in its stack; 0 without room for a subspace."""
        if self.rank is None:
            return self.side
        return self.rank if self.rank < self.side else 0

    @property
    def whole(self) -> bool:
        """Whether gradients of whole matrices exist, which stacks need: none of their matrices is split among ranks."""
        if not self.stacked:
            return True
        ranks = ranks_of(self.parameter)
        return self.backward == "whole" and (ranks is None or split_axis(self.parameter, ranks) == 0)

    @property
    def projected(self) -> bool:
        """Whether the parameter's state lives in a subspace."""
        return is_matrix(self.parameter) and self.allowed and self.width > 0 and self.whole


def stacks_in(module: nn.Module) -> set[int]:
    """Ids of a module's parameters [E out in] that are stacks of matrices: all with three axes but the kernels of
    convolutions, and rows, where `out` or `in` is 1.
    """
    kernels = {id(p) for part in module.modules() if isinstance(part, _ConvNd) for p in part.parameters()}
    return {id(p) for p in module.parameters() if p.ndim == 3 and min(p.shape[1:]) > 1} - kernels


def setting_applies(setting: bool | Sequence[str], name: str) -> bool:
    """Whether a setting that is True, False, or patterns of names holds for a parameter of this name."""
    return setting if isinstance(setting, bool) else matches(name, setting)


def require_some_projected(owner: str, selections: Sequence[Selection]) -> None:
    """Raises: UserError if nothing would be projected.

    Args:
        owner: the optimiser's class.
        selections: those of all parameters.
    """
    candidates = [one for one in selections if is_matrix(one.parameter) and one.allowed and one.side]
    if any(one.projected for one in candidates):
        return
    if not candidates:
        raise UserError(
            f"{owner} got no matrix to project: pass real parameters with two or more axes in a group with "
            "project=True, or set project=False in all groups to use AdamW"
        )
    sides = [(one.side, one.rank) for one in candidates if one.whole and one.rank is not None]
    if not sides:
        raise UserError(
            f"{owner} got no matrix to project except stacks [experts out in], which need gradients of whole matrices; "
            "set backward='whole', split them along their first axis, or use AdamW"
        )
    side, rank = max(sides)
    way_out = f"choose a rank from 1 to {side - 1}, or use AdamW" if side > 1 else "use AdamW"
    raise UserError(
        f"rank={rank} is not below the shorter side of any matrix (the largest is {side}), so nothing would be "
        f"projected; {way_out}"
    )
