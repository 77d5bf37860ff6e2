"""Concrete AdaMerging, its first stage: a mask that is good for the coefficients that one step of AdaMerging finds.

Source: arXiv 2312.06173, bi-level and first-order. With the masked vectors of one draw m,

    inner: w = 0.3 for all, then one step on w that makes the entropy of a batch smaller
    outer: on another batch the entropy at that w, and an optimiser's step on the mask's logits x

and no gradient through the inner step. Then `AdaMerging(mask=...)` learns w anew under the mask that is found.

`inner` makes the inner step, and what it remembers outlives the reset of w. SGD with lr 1, the default, is the gradient
step that the paper speaks of. The authors' code has Adam with lr 1, so that each w moves by about 1, far beyond 0.3:
to 1.3 or -0.7 here and in their fusion_bench, to 1 or 0 in the paper's own repository, which clamps w to [0, 1].
Every other sample of a batch is of the inner step, the rest of the outer one: ranks hold runs of the batch, so that N
of them with an even number of samples each split it as one does. One draw of the mask serves both.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightspan.core.distributed import mean_over_ranks, world_size
from lightspan.core.errors import UserError
from lightspan.merging.coefficients import Wise, wise_as
from lightspan.merging.concrete import ConcreteMask, Final
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.models import Models

GRADIENT_STEP = partial(torch.optim.SGD, lr=1.0)
INNER = "inner_optimizer"  # of a training checkpoint: the state of the optimiser of w


class ConcreteAdaMerging(LearnedMerging):
    """Args:
    backbone, models, heads: as of `LearnedMerging`.
    wise: one coefficient a "task", or a task and "layer".
    weight: what w is reset to.
    inner: the optimiser of w, see above.
    temperature, start, final, seed: of `ConcreteMask`.
    settings: the others of `LearnedMerging`; `optimizer` is that of the logits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        wise: Wise = "layer",
        weight: float = 0.3,
        inner: OptimizerCallable = GRADIENT_STEP,
        temperature: float = 0.5,
        start: float = 0.0,
        final: Final = "sample",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(backbone, models, heads, **settings)
        self.learned = wise_as(wise, self.span.shapes, len(self.span.tasks), weight)
        self.learned.weight.requires_grad_(False)  # the optimiser of the logits leaves it alone
        try:
            self.inner = inner([self.learned.weight])
        except ValueError as error:
            raise UserError(f"ConcreteAdaMerging: the inner optimiser refuses its settings ({error})") from error
        self.concrete = ConcreteMask(self.span.shapes, temperature, start, final, seed)

    def coefficients(self) -> dict[str, Tensor]:
        return {name: self.learned.of(name) for name in self.span.shapes}

    def mask(self) -> dict[str, Tensor]:
        return self.concrete.settled()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        if len(batch["index"]) < 2:
            raise UserError(
                "ConcreteAdaMerging needs two samples a batch on each rank; raise data.init_args.batch_size"
            )
        mask = self.concrete.drawn(self.global_step)
        first, second = (
            {field: x[part] for field, x in batch.items()} for part in (slice(1, None, 2), slice(0, None, 2))
        )
        w = self.inner_step(first, {name: m.detach() for name, m in mask.items()})
        theta = self.span.merged(self._at(w), mask)
        loss = self.entropy(theta, second)
        figures = {"train/entropy_nats": loss, "train/density": self.concrete.density()}
        self.log_training(figures, batch_size=len(batch["index"]), prog_bar=True)
        return loss

    def inner_step(self, batch: Mapping[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        """w after its step from `weight`, the same on all ranks; what it is reset to is not changed."""
        weight = self.learned.weight
        reset = weight.clone()
        with torch.enable_grad():
            w = reset.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.entropy(self.span.merged(self._at(w), mask), batch), w)
        if world_size() > 1:
            mean_over_ranks([gradient])
        weight.grad = gradient
        self.inner.step()
        weight.grad, moved = None, weight.clone()
        weight.copy_(reset)
        return moved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[INNER] = self.inner.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if INNER in checkpoint:
            self.inner.load_state_dict(checkpoint[INNER])

    def _at(self, w: Tensor) -> dict[str, Tensor]:
        return {name: self.learned.of(name, w) for name in self.span.shapes}
