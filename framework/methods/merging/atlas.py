"""aTLAS: one coefficient a task vector and parameter block, learned for what the model is wanted for.

Source: Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad, "Knowledge Composition using Task Vectors with
Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880:

    theta_j = theta_{0,j} + sum_i Lambda_ij tau_ij                                          (its equation 7)
    Lambda = 0 at first,    dL/dLambda_ij = <dL/dtheta_j, tau_ij>

with j over the parameter tensors, its parameter blocks. `Atlas` minimises its equation 4: addition (section 4.2),
few-shot adaptation (5.1) and, with `parts` (aTLAS x K, 6.2), parameter-efficient tuning. `AtlasNegation` unlearns
(equation 9), `AtlasTestTime` has no labels (section 5.3, appendix E). Vectors come from `models`, whose tasks need not
be those that are trained on; PEFT adapters among them are the paper's low-rank task vectors (6.1).

Of the authors' code these are not taken over: random groups by shape that leave out all but matrices
(`lightspan.merging.coefficients.Partitioned`), coefficients that are None where no epoch was better than theta_0 (it is
kept), and what `lightspan.objectives.pseudo_labels` lists. The linearised variant, equations 1 and 5, is left out.

Shapes: B batch of this rank, C classes, L tensors, P groups, K vectors, b of them in use.
"""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sum, mean_over_ranks, world_size
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ImageBatch, TasksBatch, ViewsBatch
from lightspan.merging.coefficients import Partitioned
from lightspan.merging.learned import LearnedMerging
from lightspan.merging.models import Models
from lightspan.merging.span import TaskSpan
from lightspan.objectives.classes import label_cross_entropy
from lightspan.objectives.pseudo_labels import pseudo_label_loss, trusted_labels


class AnisotropicScaling(LearnedMerging):
    """What the uses share: Lambda, and the choice of vectors.

    Args:
        backbone, models, heads: as of `LearnedMerging`.
        parts, seed: P and the seed of `Partitioned`.
        budget: b, vectors that each block may use: those with the largest |dL/dLambda| at Lambda = 0 on the
            training samples (block-wise gradient selection, section 5.2). None uses all.
        settings: the others of `LearnedMerging`.
    """

    chosen_Lb: Tensor
    is_chosen: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        parts: int = 1,
        budget: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(backbone, models, heads, **settings)
        count = len(self.span.tasks)
        if budget is not None and not 1 <= budget <= count:
            raise UserError(f"budget={budget} must be from 1 to {count}, the number of task vectors")
        self.budget = budget
        self.learned = Partitioned(self.span.shapes, budget or count, 0.0, parts, seed)
        self.register_buffer("chosen_Lb", torch.arange(budget or count).repeat(len(self.span.shapes), 1))
        self.register_buffer("is_chosen", torch.tensor(budget is None))

    def coefficients(self) -> dict[str, Tensor]:
        c = {name: self.learned.of(name) for name in self.span.shapes}
        if self.budget is None or self.span.is_narrowed:
            return c
        if self.is_chosen:  # by the run that this checkpoint is of
            self._narrow()
            return c
        rows = enumerate(c.items())  # not chosen yet, as when a run is planned
        full = len(self.span.tasks)
        return {n: x.new_zeros(full, *x.shape[1:]).index_copy(0, self.chosen_Lb[row], x) for row, (n, x) in rows}

    @abstractmethod
    def loss(self, theta: dict[str, Tensor], batch: Any) -> Tensor:
        """What is made small."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.merged(), batch)
        self.log_training({"train/loss": loss}, batch_size=len(batch["index"]), prog_bar=True)
        return loss

    def on_fit_start(self) -> None:
        if not self.is_chosen:
            assert self.budget is not None
            gradient_LK = self.gradient_at_start()
            self.chosen_Lb.copy_(gradient_LK.abs().topk(self.budget, dim=1).indices.sort(dim=1).values)
            self.is_chosen.fill_(True)
        if self.budget is not None and not self.span.is_narrowed:
            self._narrow()

    def gradient_at_start(self) -> Tensor:
        """dL/dLambda at Lambda = 0, [L K], up to a factor: each sample of `bank_dataloader` counts the same, on any
        number of ranks and in batches of any size.
        """
        bank = getattr(getattr(self.trainer, "datamodule", None), "bank_dataloader", None)
        if bank is None:
            raise UserError(
                f"{type(self).__name__} budget={self.budget} looks at the training samples in order, and these data "
                "have no bank_dataloader(); take TaskImages, or leave budget out"
            )
        theta = {n: self.span.network.get_parameter(n).detach().clone().requires_grad_() for n in self.span.shapes}
        sums = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
        with torch.enable_grad():
            for batch in bank():
                loss, parameters = self.loss(theta, self.taken(batch)), list(theta.values())
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                rows = all_reduce_sum(loss.new_tensor(len(batch["index"])))  # whose mean the loss is
                for name, gradient in zip(theta, gradients, strict=True):
                    sums[name] += rows.to(gradient) * gradient
        pulled = [TaskSpan(self.span.vectors(name)).pull(sums[name]) for name in theta]  # type: ignore[arg-type]
        gradient_LK = torch.stack(pulled)
        if world_size() > 1:
            mean_over_ranks([gradient_LK])
        return gradient_LK

    def taken(self, batch: Any, loader: int = 0) -> Any:
        """A batch that no step of the Trainer brought, in the run's precision and on its device."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        return self.transfer_batch_to_device(batch, self.device, loader)

    def _narrow(self) -> None:
        self.span.keep(dict(zip(self.span.shapes, self.chosen_Lb, strict=True)))


class Atlas(AnisotropicScaling):
    """Task vectors are added with a coefficient for each block, learned from the sum of the tasks' cross-entropies on
    `TasksBatch`. What scored best in validation is the result, theta_0
    included; without validation data it is what the last step left. Arguments as of `AnisotropicScaling`.
    """

    best: Tensor
    best_score: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        **settings: Any,
    ) -> None:
        super().__init__(backbone, models, heads, **settings)
        self.register_buffer("best", torch.zeros_like(self.learned.weight))
        self.register_buffer("best_score", torch.tensor(-torch.inf))

    def loss(self, theta: dict[str, Tensor], batch: TasksBatch) -> Tensor:
        losses = [
            self.weight_of(task) * label_cross_entropy(logits_BC, batch["label"][:, i])
            for i, (task, logits_BC) in enumerate(self.task_logits(theta, batch).items())
        ]
        return torch.stack(losses).sum()

    def weight_of(self, task: str) -> float:
        """Of a task's cross-entropy."""
        return 1.0

    def score(self, accuracies: dict[str, float]) -> float:
        """What is best when it is largest."""
        return sum(accuracies.values()) / len(accuracies)

    def on_train_start(self) -> None:
        """Scores theta_0, unless a checkpoint has brought a score."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not self.trainer.enable_validation or self.best_score > -torch.inf:
            return
        loaders = data.val_dataloader()
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            self.on_validation_epoch_start()
            for i, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
                for j, batch in enumerate(loader):
                    self.validation_step(self.taken(batch, i), j, i)
            self.begin(self.accuracies())
            self.take_if_best()

    def begin(self, accuracies: dict[str, float]) -> None:
        """Called with the accuracies of theta_0."""

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.take_if_best()
        super().on_validation_epoch_end()

    def take_if_best(self) -> None:
        """Keeps a copy of the coefficients where they score better than all before."""
        score = self.score(self.accuracies())
        if score > self.best_score:
            self.best.copy_(self.learned.weight.detach())
            self.best_score.fill_(score)

    def on_train_end(self) -> None:
        if self.best_score > -torch.inf:
            with torch.no_grad():
                self.learned.weight.copy_(self.best)


class AtlasNegation(Atlas):
    """Unlearns a task and keeps the others, its controls: their cross-entropies minus that of the target. The result
    has the lowest target accuracy while every control keeps a share of what theta_0 reaches; once none does, training
    stops.

    Args:
        target: the task of `heads` to unlearn.
        floor: that share.
        backbone, models, heads, settings: as of `AnisotropicScaling`.
    """

    control_start: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        target: str,
        floor: float = 0.95,
        **settings: Any,
    ) -> None:
        if target not in heads or len(heads) < 2:
            raise UserError(
                f"AtlasNegation target={target!r} must be one of the heads {', '.join(heads)}, beside a control task"
            )
        require_in("[0, 1]", floor=floor)
        super().__init__(backbone, models, heads, **settings)
        self.target, self.floor = target, floor
        self.register_buffer("control_start", torch.zeros(len(heads), dtype=torch.float64))

    def weight_of(self, task: str) -> float:
        return -1.0 if task == self.target else 1.0

    def begin(self, accuracies: dict[str, float]) -> None:
        self.control_start.copy_(torch.tensor(list(accuracies.values())))

    def score(self, accuracies: dict[str, float]) -> float:
        starts = zip(accuracies.items(), self.control_start.tolist(), strict=True)
        if any(value < self.floor * start for (task, value), start in starts if task != self.target):
            self.trainer.should_stop = True
            return -torch.inf
        return -accuracies[self.target]


class AtlasTestTime(AnisotropicScaling):
    """Adapts to one task without labels, on `ViewsBatch` of a weak and a strong view: see
    `lightspan.objectives.pseudo_labels`. Which samples are trusted is what theta_0 says of the images of
    `bank_dataloader`, before the first step.

    The authors also draw trusted samples more often; here all are drawn alike.

    Args:
        confidence, temperature: of `pseudo_label_loss`.
        backbone, models, heads, settings: as of `AnisotropicScaling`; one head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        confidence: float = 0.99,
        temperature: float = 0.5,
        **settings: Any,
    ) -> None:
        if len(heads) != 1:
            raise UserError(f"AtlasTestTime adapts to one task, and heads has {', '.join(heads) or 'none'}")
        require_in("[0, 1]", confidence=confidence)
        require_in("(0, inf)", temperature=temperature)
        super().__init__(backbone, models, heads, **settings)
        self.confidence, self.temperature = confidence, temperature
        self._trusted_N = torch.zeros(0, dtype=torch.int64)

    def loss(self, theta: dict[str, Tensor], batch: Any) -> Tensor:
        (task,) = self.heads
        if "views" not in batch:  # the bank, by which vectors are chosen: both views are the image
            logits_BC = self.logits(theta, task, batch)
            return self._of_views(logits_BC, logits_BC, batch)
        weak, strong = batch["views"][:2]
        with torch.no_grad():
            weak_BC = self.logits(theta, task, {"image": weak})
        return self._of_views(self.logits(theta, task, {"image": strong}), weak_BC, batch)

    def _of_views(self, strong_BC: Tensor, weak_BC: Tensor, batch: ViewsBatch | ImageBatch) -> Tensor:
        trusted_N = self._trusted_N.to(strong_BC.device)
        trusted_B = trusted_N[batch["index"]] if len(trusted_N) else torch.full_like(batch["index"], -1)
        return pseudo_label_loss(strong_BC, weak_BC, trusted_B, self.confidence, self.temperature)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "bank_dataloader", None) is None:
            raise UserError("AtlasTestTime needs data with bank_dataloader(), such as `lightspan.datamodules.image`")
        loader, (task,) = data.bank_dataloader(), self.heads
        theta = {name: self.span.network.get_parameter(name) for name in self.span.shapes}
        probability_NC: Tensor | None = None
        for batch in loader:
            batch = self.taken(batch)
            with self.trainer.precision_plugin.val_step_context():
                p_BC = wide(self.logits(theta, task, batch)).softmax(dim=1)
            if probability_NC is None:
                probability_NC = p_BC.new_zeros(len(loader.dataset), p_BC.shape[1])
            probability_NC[batch["index"]] = p_BC
        assert probability_NC is not None
        self._trusted_N = trusted_labels(all_reduce_sum(probability_NC))
        super().on_fit_start()
