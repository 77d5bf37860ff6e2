"""The loss of an arm's own training on given batches, before and after: what its gate is made of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def own_loss(make: Callable[[], Any], weights: Mapping[str, Tensor], batches: Iterable[dict[str, Any]]) -> float:
    """The mean over batches for a new method with these weights, in evaluation mode.

    No Trainer holds the method, so that schedules stand at their start and masks are those of step 0 for all.
    """
    method = make()
    method.load_state_dict(weights)
    method.log_training = lambda figures, **options: None
    losses = [float(method.eval().training_step(batch, at)) for at, batch in enumerate(batches)]
    return sum(losses) / len(losses)
