"""Concrete AdaMerging, its first stage: a mask that is good for the coefficients that one step of AdaMerging finds.

Source: arXiv 2312.06173, bi-level and first-order. With the masked vectors of one draw m,

    inner: w = 0.3 for all, then one step on w that makes the entropy of a batch smaller
    outer: on another batch the entropy at that w, and an optimiser's step on the mask's logits x

and no gradient through the inner step. Then `AdaMerging(mask=...)` learns w anew under the mask that is found.

The inner step is `inner`: "gradient" is w - lr grad, the gradient step that the paper speaks of. The authors' code has
Adam with lr 1 whose moments outlive the reset of w ("adam_kept"), so that each w moves by about 1, far beyond 0.3;
"adam" also forgets the moments, which makes each step exactly lr times the sign.
Every other sample of a batch is of the inner step, the rest of the outer one: ranks hold runs of the batch, so that N
of them with an even number of samples each split it as one does. One draw of the mask serves both.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightspan.datamodules.batches import TasksBatch
from lightspan.distributed import mean_over_ranks, world_size
from lightspan.errors import UserError
from lightspan.merging.coefficients import LayerWise, TaskWise
from lightspan.merging.concrete import ConcreteMask, Final
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.models import Models
from lightspan.objectives.entropy import prediction_entropy

BETAS, EPS = (0.9, 0.999), 1e-8


class ConcreteAdaMerging(LearnedMerging):
    """Args:
    backbone, models, heads, prefix, out: as of `LearnedMerging`.
    wise: one coefficient a "task", or a task and "layer".
    weight: what w is reset to.
    inner, inner_lr: the inner step, see above.
    temperature, start, final, seed: of `ConcreteMask`.
    optimization: `optimizer` of the logits, `lr_scheduler` and `groups`, see `Method`.
    """

    first_moment: Tensor
    second_moment: Tensor
    inner_steps: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        wise: Literal["task", "layer"] = "layer",
        weight: float = 0.3,
        inner: Literal["gradient", "adam", "adam_kept"] = "gradient",
        inner_lr: float = 1.0,
        temperature: float = 0.5,
        start: float = 0.0,
        final: Final = "sample",
        seed: int = 0,
        prefix: str = "backbone.",
        out: str | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(backbone, models, heads, prefix, out, **optimization)
        if wise not in ("task", "layer"):
            raise UserError(f"ConcreteAdaMerging wise={wise!r} must be task or layer")
        if inner not in ("gradient", "adam", "adam_kept") or not inner_lr >= 0:
            raise UserError(
                f"ConcreteAdaMerging inner={inner!r} must be gradient, adam or adam_kept, and inner_lr={inner_lr} at "
                "least 0"
            )
        kind = TaskWise if wise == "task" else LayerWise
        self.learned = kind(self.span.shapes, len(self.span.tasks), weight)
        self.learned.weight.requires_grad_(False)  # the inner step is made by hand
        self.inner, self.inner_lr = inner, inner_lr
        self.concrete = ConcreteMask(self.span.shapes, temperature, start, final, seed)
        for name in ("first", "second"):
            self.register_buffer(f"{name}_moment", torch.zeros_like(self.learned.weight))
        self.register_buffer("inner_steps", torch.zeros((), dtype=torch.int64))

    def coefficients(self) -> dict[str, Tensor]:
        return {name: self.learned.of(name) for name in self.span.shapes}

    def mask(self) -> dict[str, Tensor]:
        return self.concrete.settled()

    def training_step(self, batch: TasksBatch, batch_idx: int) -> Tensor:
        if len(batch["index"]) < 2:
            raise UserError(
                "ConcreteAdaMerging needs two samples a batch on each rank; raise data.init_args.batch_size"
            )
        images = batch["image"]
        mask = self.concrete.drawn(self.global_step)
        w = self.inner_step({**batch, "image": images[1::2]}, {name: m.detach() for name, m in mask.items()})
        theta = self.span.merged(self._at(w), mask)
        loss = self.entropy(theta, {**batch, "image": images[::2]})
        figures = {"train/entropy_nats": loss, "train/density": self.concrete.density()}
        self.log_training(figures, batch_size=len(images), prog_bar=True)
        return loss

    def entropy(self, theta: dict[str, Tensor], batch: TasksBatch) -> Tensor:
        """The sum over tasks of the mean entropy."""
        return torch.stack([prediction_entropy(logits) for logits in self.task_logits(theta, batch).values()]).sum()

    def inner_step(self, batch: TasksBatch, mask: dict[str, Tensor]) -> Tensor:
        """w after its step from `weight`, the same on all ranks; what it is reset to is not changed."""
        with torch.enable_grad():
            w = self.learned.weight.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.entropy(self.span.merged(self._at(w), mask), batch), w)
        if world_size() > 1:
            mean_over_ranks([gradient])
        return w.detach() - self.inner_lr * (gradient if self.inner == "gradient" else self._adam(gradient))

    @torch.no_grad()
    def _adam(self, gradient: Tensor) -> Tensor:
        """Adam's direction (arXiv 1412.6980, algorithm 1)."""
        if self.inner == "adam":
            for state in (self.first_moment, self.second_moment, self.inner_steps):
                state.zero_()
        self.inner_steps += 1
        self.first_moment.lerp_(gradient, 1 - BETAS[0])
        self.second_moment.lerp_(gradient.square(), 1 - BETAS[1])
        first, second = (
            moment / (1 - beta**self.inner_steps)
            for moment, beta in zip((self.first_moment, self.second_moment), BETAS, strict=True)
        )
        return first / (second.sqrt() + EPS)

    def _at(self, w: Tensor) -> dict[str, Tensor]:
        return {name: self.learned.of(name, w) for name in self.span.shapes}
