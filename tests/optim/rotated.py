"""AdamW in rotated coordinates: what every projected Adam is at full rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.optim.reference.loop import as_given, tall


def adamw_rotated(
    weight: Tensor,
    gradients: Sequence[Tensor],
    frame: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """torch's own AdamW on the coordinates W Q, for one orthogonal Q [N N] of the shorter side."""
    rotated = torch.nn.Parameter(tall(weight) @ frame.double())
    optimizer = torch.optim.AdamW([rotated], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for gradient in gradients:
        rotated.grad = tall(gradient) @ frame.double()
        optimizer.step()
    return as_given(rotated.detach() @ frame.double().T, weight)
