"""A network that is not trained: a teacher, a reference, a judge of what a trained part shows it."""

from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)


class FixedNetwork(nn.Module):
    """Calls `module` with gradients to what goes in, while its weights stay: always in evaluation mode, so that neither
    dropout nor statistics of a batch make a difference.

    Args:
        norms: train the weights of its norms, which then take statistics of a batch in training, and class tokens.
    """

    def __init__(self, module: nn.Module, norms: bool = False) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.tuned = [part for part in module.modules() if norms and isinstance(part, NORMS)]
        for part in self.tuned:
            part.requires_grad_(True)
        for name, parameter in module.named_parameters():
            if norms and name.rpartition(".")[2] == "cls_token":
                parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.module.eval()
        for part in self.tuned:
            part.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def require_apart(teacher: nn.Module, backbone: nn.Module) -> None:
    """Raises: UserError for a teacher that shares a weight with the student's backbone."""
    if {*map(id, teacher.parameters())} & {*map(id, backbone.parameters())}:
        raise UserError("the teacher shares weights with the backbone, and would be frozen with it; give it a copy")
