"""A network that is not trained: a teacher, a reference."""

from typing import Any, Self

import torch
from torch import nn

from lightspan.core.errors import UserError


class Frozen(nn.Module):
    """Calls `module` without gradients, always in evaluation mode, whatever the mode of the module around it.

    Its weights no longer require gradients. As the backbone of a method it has the width that `module` says.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.num_features: int | None = getattr(module, "num_features", None)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def require_apart(teacher: nn.Module, backbone: nn.Module) -> None:
    """Raises: UserError for a teacher that shares a weight with the student's backbone."""
    if {*map(id, teacher.parameters())} & {*map(id, backbone.parameters())}:
        raise UserError("the teacher shares weights with the backbone, and would be frozen with it; give it a copy")
