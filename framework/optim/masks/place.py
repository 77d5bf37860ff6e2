"""A parameter that has a mask: what this rank holds of it, and all of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.core.devices import widest_float
from lightspan.core.sharded import RowShards, local, own_part, ranks_of, split_axis, whole_of
from lightspan.subspaces.masks.draws import uniform


@dataclass(frozen=True)
class Place:
    """Everything a learner keeps of a parameter has the shape of `weight`."""

    name: str
    parameter: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter."""
        return self.parameter.shape

    @property
    def weight(self) -> Tensor:
        """What this rank holds, without a gradient; writing to it writes to the parameter."""
        return local(self.parameter.detach())

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the parameter's shape."""
        return own_part(whole.to(self.weight.device), self.parameter)

    def whole(self, part: Tensor) -> Tensor:
        """All of a tensor of which this rank holds `part`. All ranks must call it."""
        return whole_of(part.detach(), self.parameter)

    def uniform(self, seed: int, step: int) -> Tensor:
        """This rank's uniform numbers of a step, in float32, or float64 for weights of that type."""
        weight = self.weight
        dtype = torch.float64 if weight.dtype == widest_float(weight.device) == torch.float64 else torch.float32
        ranks, offset = ranks_of(self.parameter), [0] * weight.ndim
        if ranks is not None:
            axis = split_axis(self.parameter, ranks)
            offset[axis] = RowShards(ranks, self.shape[axis], moved=False).start
        shape = list(weight.shape)
        return uniform(
            seed, step, self.name, shape, dtype=dtype, device=weight.device, within=list(self.shape), offset=offset
        )
