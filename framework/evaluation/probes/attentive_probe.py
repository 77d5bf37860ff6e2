"""A probe that pools tokens by attention before its linear layer: what frozen tokens tell that their mean does not.

Shapes: N training rows, T tokens, D width, C outputs.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lightspan.core.errors import UserError
from lightspan.core.generators import drawn_from
from lightspan.evaluation.labels import Kind, require_readable
from lightspan.nn.heads.attention_pool import AttentionPool


class AttentiveHead(nn.Module):
    """`AttentionPool`, then a linear layer that begins at zero: [B T D] -> [B C].

    Attributes:
        mean_C, scale_C: give numbers back their own unit; 0 and 1 for classes and tags.
    """

    mean_C: Tensor
    scale_C: Tensor

    def __init__(self, width: int, outputs: int, heads: int) -> None:
        super().__init__()
        self.pool, self.linear = AttentionPool(width, heads), nn.Linear(width, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean_C", torch.zeros(outputs))
        self.register_buffer("scale_C", torch.ones(outputs))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mean_C + self.scale_C * self.linear(self.pool(x_BTD))


def fit_attentive_heads(
    train_NTD: Tensor,
    labels: Tensor,
    rates: Sequence[float],
    steps: int = 200,
    batch_size: int = 128,
    weight_decay: float = 0.01,
    heads: int = 8,
    seed: int = 0,
) -> list[AttentiveHead]:
    """One trained head for each rate, in their order; all see the same batches, in one pass over them.

    AdamW, with a half cosine of the rate to zero. All start from the same weights. In float32, without touching any
    random state: the result depends on the arguments alone.

    Args:
        labels: classes, tags or numbers, as in `fit_linear_probe`.
        rates: learning rates, each > 0.
    Raises: UserError for no row, token or feature, rows that are not finite, or labels as in `fit_linear_probe`.
    """
    if train_NTD.ndim != 3 or not train_NTD.numel():
        raise UserError(
            f"attentive probe needs tokens [N, T, D], at least one of each, but got {list(train_NTD.shape)}"
        )
    if not train_NTD.isfinite().all():
        raise UserError("tokens contain NaN or infinite values, so no probe fits them; the model has diverged")
    kind = require_readable("attentive probe", train_NTD, labels)
    with torch.inference_mode(False), torch.enable_grad():
        x_NTD, target = train_NTD.detach().float().clone(), labels.clone()
        if kind != "classes":
            target = target.float().view(len(target), -1)
        outputs = 1 + int(target.max()) if kind == "classes" else target.shape[1]
        if kind == "numbers":
            scale_C, mean_C = torch.std_mean(target, dim=0, correction=0)
            scale_C = torch.where(scale_C > 0, scale_C, 1)
            target = (target - mean_C) / scale_C
        found = []
        for _ in rates:
            with drawn_from(seed):
                found.append(AttentiveHead(x_NTD.shape[2], outputs, heads).to(x_NTD.device))
        groups = [{"params": [*head.parameters()], "lr": rate} for head, rate in zip(found, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
        for step, rows in enumerate(_batches(len(x_NTD), batch_size, steps, seed)):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            # Heads share no weight, so the gradient of the sum is each one's own.
            loss = torch.stack([_LOSSES[kind](head(x_NTD[rows]), target[rows]) for head in found]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for head in found if kind == "numbers" else ():
            head.mean_C.copy_(mean_C)
            head.scale_C.copy_(scale_C)
    return [head.eval().requires_grad_(False) for head in found]


_LOSSES: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "classes": cross_entropy,
    "tags": binary_cross_entropy_with_logits,
    "numbers": mse_loss,
}


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of each step: all in a random order, the rest of which is left out, and anew."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    size = min(size, count)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        rows, order = order[:size], order[size:]
        yield rows
