"""How the second view of a sample differs from the first, told from the parameters of both.

Shapes: B samples, V views, P parameters of a view, K numbers of a relation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ViewParameters

Column = str | int
"""Of a view's parameters: a name of `ViewParameters`, or a place from 0 for data with columns of their own."""


def parameters_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """The parameters of two views, [B 2 P] in float32 or wider, without gradient.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without those of exactly two views.
    """
    parameters = batch.get("parameters")
    if not isinstance(parameters, Tensor) or parameters.ndim != 3 or parameters.shape[1] != 2:
        got = list(parameters.shape) if isinstance(parameters, Tensor) else "none"
        raise UserError(
            f"{method} needs the parameters of two views of each sample, float [B, 2, P], and this batch has {got} (it "
            f"holds {', '.join(sorted(batch))}); give data.init_args.views that are drawn, such as "
            "lightspan.datamodules.image.augment.views.TwoViews, or data that know how each view was made"
        )
    return wide(parameters.detach())


class Relation(nn.Module, ABC):
    """Maps the parameters [B 2 P] of two views to K numbers [B K] that tell how to come from the first to the second.

    Attributes:
        num_features: K.
    """

    num_features: int

    @abstractmethod
    def forward(self, parameters_B2P: Tensor) -> Tensor: ...


class Difference(Relation):
    """Second minus first, in the columns' own units.

    Args:
        columns: at least one.
        scale: by which all are divided, above 0: about the size of the differences.
    """

    def __init__(self, columns: list[Column], scale: float = 1.0) -> None:
        super().__init__()
        if not columns or not scale > 0:
            raise UserError(f"Difference columns={columns} must be at least one, and scale={scale} above 0")
        self.places, self.scale = [_place(column) for column in columns], scale
        self.num_features = len(columns)

    def forward(self, parameters_B2P: Tensor) -> Tensor:
        p_B2K = _columns(parameters_B2P, self.places)
        return (p_B2K[:, 1] - p_B2K[:, 0]) / self.scale


class PlaneTurn(Relation):
    """(cos d, sin d) of the angle d by which the second view is turned against the first.

    Args:
        column: of the angle.
        unit: how much of it is a whole turn: 360 for degrees, 6.283... for radians, 1 for a hue in turns.
    """

    num_features = 2

    def __init__(self, column: Column = "angle", unit: float = 360.0) -> None:
        super().__init__()
        require_in("(0, inf)", unit=unit)
        self.places, self.unit = [_place(column)], unit

    def forward(self, parameters_B2P: Tensor) -> Tensor:
        angle_B2 = _columns(parameters_B2P, self.places)[:, :, 0]
        turned_B = (angle_B2[:, 1] - angle_B2[:, 0]) * (2 * torch.pi / self.unit)
        return torch.stack([turned_B.cos(), turned_B.sin()], dim=1)


class SpaceTurn(Relation):
    """The unit quaternion (w x y z) of R1^-1 R2, from those of both poses, with w >= 0.

    q and -q are one rotation, of which a predictor that is linear in q would make opposite outputs: the sign is fixed
    by the first number of w x y z that is not 0.

    Args:
        first: column of w, which x, y and z follow. Poses are unit quaternions of either sign.
    """

    num_features = 4

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.places = [_place(first + i) for i in range(4)]

    def forward(self, parameters_B2P: Tensor) -> Tensor:
        a, b = _columns(parameters_B2P, self.places).unbind(dim=1)
        wa, xa, ya, za = (a * a.new_tensor([1.0, -1.0, -1.0, -1.0])).unbind(dim=1)  # the inverse of a rotation
        wb, xb, yb, zb = b.unbind(dim=1)
        q_B4 = torch.stack(
            [
                wa * wb - xa * xb - ya * yb - za * zb,
                wa * xb + xa * wb + ya * zb - za * yb,
                wa * yb - xa * zb + ya * wb + za * xb,
                wa * zb + xa * yb - ya * xb + za * wb,
            ],
            dim=1,
        )
        leading_B1 = (q_B4 != 0).int().argmax(dim=1, keepdim=True)
        return torch.where(q_B4.gather(1, leading_B1) < 0, -q_B4, q_B4)


class Relations(Relation):
    """Several, one beside the other. Args: parts: at least one."""

    def __init__(self, parts: list[Relation]) -> None:
        super().__init__()
        if not parts:
            raise UserError("Relations parts is an empty list; give at least one relation")
        self.parts = nn.ModuleList(parts)
        self.num_features = sum(part.num_features for part in parts)

    def forward(self, parameters_B2P: Tensor) -> Tensor:
        return torch.cat([part(parameters_B2P) for part in self.parts], dim=1)


def _place(column: Column) -> int:
    if isinstance(column, str) and column in ViewParameters._fields:
        return ViewParameters._fields.index(column)
    if isinstance(column, int) and column >= 0:
        return column
    raise UserError(
        f"column {column!r} is none of the parameters of a view, {', '.join(ViewParameters._fields)}, nor a place "
        "from 0"
    )


def _columns(parameters_B2P: Tensor, places: list[int]) -> Tensor:
    count = parameters_B2P.shape[2]
    if max(places) >= count:
        raise UserError(
            f"a relation of views reads column {max(places)} (from 0) of their parameters, and the data have {count}; "
            "name columns that they have"
        )
    return parameters_B2P[:, :, places]
