"""SLCA: classes come task by task to a pre-trained backbone, which learns slowly; then the classifier is aligned.

Source: Zhang, Wang, Kang, Chen, Wei, "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
Pre-trained Model", ICCV 2023, arXiv 2303.05118, and the authors' code. In each task the cross-entropy is over its own
classes alone, the backbone at a hundredth of the head's rate, rows of the head that belong to other tasks as they are.
Then a Gaussian of each new class is kept, and a copy of the head is trained on features drawn from those of all
classes (`lightspan.evaluation.gaussians.classifier_alignment`): it answers until the next task begins, which goes on
from the head itself. Of the code, not of the paper: the means of older classes are shrunk, the optimiser and its
schedule start anew with each task, weight decay and momentum of the alignment. Differs from it: the head is one linear
layer, whose other rows are written back after each step; each covariance is factored once; classes of a task may be
any, and tasks of different sizes. Assumed: the start of the head, N(0, 0.02^2) cut at two deviations and no bias.
Unverified: the figures of the paper's tables.
Shapes: B images of this rank, F features, C classes, T tasks, S samples of a class.
"""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.distributed import agreed, register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_shares, require_temperatures, require_weights
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.evaluation.gaussians.class_gaussians import ClassGaussians
from lightspan.evaluation.gaussians.classifier_alignment import ClassifierAlignment
from lightspan.evaluation.geometry.moments import Moments
from lightspan.nn.labels import labels_of
from lightspan.nn.views import image_of
from lightspan.nn.widths import given_features
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.optim.groups import Rule
from lightspan.optim.schedules import ScheduleCallable, restarting_schedule
from lightspan.training.method import Method


class SLCA(Method):
    """Trains a pre-trained backbone on tasks of new classes, without any sample of earlier ones.

    Data have `tasks` (the classes of each), `task_steps()` and `task_bank(number)`, as
    `lightspan.datamodules.image.variants.class_stream.ClassStream`, whose epoch is the whole stream; other data are one
    task of all classes, which is plain training without alignment. After the last step of a task predictions come from
    the aligned head, while a task trains from the plain one; classes that have not come yet are never predicted.

    Args:
        backbone: [B C H W] -> [B F], pre-trained; what probes read.
        num_classes: C >= 2 of all tasks together; labels are in [0, C).
        backbone_rate: of the backbone over that of the head, which is the optimiser's, in (0, 1]; 1 is plain
            fine-tuning. Rules of `groups` come first.
        align_epochs, samples, align_lr, align_decay, temperature, shrink, seed: see `ClassifierAlignment`; with
            `align_epochs` 0 the head stays as it was trained.
        jitter: added to the variances of each class, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`. The schedule's run is one task.
    """

    task_C: Tensor
    begun: Tensor
    done: Tensor
    aligned_weight: Tensor
    aligned_bias: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        backbone_rate: float = 0.01,
        align_epochs: int = 5,
        samples: int = 256,
        align_lr: float = 0.01,
        align_decay: float = 5e-4,
        temperature: float = 0.1,
        shrink: float = 0.9,
        jitter: float = 1e-4,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        require_in("[0, inf)", align_epochs=align_epochs, seed=seed)
        require_in("[1, inf)", samples=samples)
        require_in("(0, 1]", backbone_rate=backbone_rate)
        require_in("(0, inf)", align_lr=align_lr)
        require_weights(align_decay=align_decay, jitter=jitter)
        require_temperatures(temperature=temperature)
        require_shares(shrink=shrink)
        if backbone_rate < 1:
            slow = Rule(match=["backbone.*"], lr_scale=backbone_rate)
            self.groups = replace(self.groups, rules=[*self.groups.rules, slow])
        self.backbone, self.num_classes = backbone, num_classes
        if (width := given_features(backbone)) is None:
            raise UserError(
                f"SLCA needs the width of its backbone, but {type(backbone).__name__} has no attribute num_features; "
                "use one of lightspan.backbones.vision or set it"
            )
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.head.bias)
        self.alignment = ClassifierAlignment(align_epochs, samples, align_lr, align_decay, temperature, shrink, seed)
        self.gaussians = ClassGaussians(num_classes, self.head.in_features, jitter)
        register_replicated(self, "task_C", torch.zeros(num_classes, dtype=torch.int64))
        register_replicated(self, "begun", torch.tensor(0))  # tasks
        register_replicated(self, "done", torch.tensor(0))
        register_replicated(self, "aligned_weight", self.head.weight.detach().clone())
        register_replicated(self, "aligned_bias", self.head.bias.detach().clone())
        self._steps: list[int] = []
        self._training = -1  # the task whose head is kept; none yet

    def setup(self, stage: str) -> None:
        """Raises: UserError for data of another number of classes."""
        super().setup(stage)
        data: Any = getattr(self._trainer, "datamodule", None)
        tasks = getattr(data, "tasks", None)
        if stage != "fit" or tasks is None:
            return
        if sorted(number for task in tasks for number in task) != list(range(len(self.task_C))):
            raise UserError(
                f"the tasks of {type(data).__name__} have the classes {tasks}, and SLCA num_classes="
                f"{len(self.task_C)}; give it their number"
            )
        for number, task in enumerate(tasks):
            self.task_C[task] = number
        self._steps = list(data.task_steps()) if len(tasks) > 1 else []

    def configure_model(self) -> None:
        self.require_whole("writes rows of a whole head back")

    def run_schedule(self) -> ScheduleCallable | None:
        """The given one for each task."""
        given = super().run_schedule()
        return restarting_schedule(given, self._steps) if given and self._steps else given

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B C], minus infinity for classes that have not come yet, if any has."""
        is_aligned = (self.done > 0) & (self.done == self.begun)
        weight = torch.where(is_aligned, self.aligned_weight, self.head.weight)
        bias = torch.where(is_aligned, self.aligned_bias, self.head.bias)
        unseen_C = (self.task_C >= self.begun) & (self.begun > 0)
        return F.linear(self.backbone(x_BCHW), weight, bias).masked_fill(unseen_C, -torch.inf)

    def on_train_start(self) -> None:
        """Raises: UserError for a run that goes through the tasks more than once."""
        if self._steps and (total := self._total_steps()) > sum(self._steps):
            raise UserError(
                f"a run of {total} steps would come back to the first task, and all tasks together have "
                f"{sum(self._steps)}; set trainer.max_epochs=1, and data.init_args.passes to see images more often"
            )
        self._training = -1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        task = self._task_of(batch_idx)
        if task == self._training:
            return
        self._training = task
        self._kept = self.head.weight.detach().clone(), self.head.bias.detach().clone()
        if task >= int(self.begun):  # not in a run that resumes within the task
            self.begun.fill_(task + 1)
            self.trainer.optimizers[0].state.clear()

    def _own(self) -> Tensor:
        """Which classes are of the task that trains, bool [C]; outside of a run, such as in a plan, the first."""
        return self.task_C == max(self._training, 0)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        image_BCHW, label_B = image_of(batch, "SLCA"), labels_of(batch, "SLCA")
        logits_BC = self.head(self.backbone(image_BCHW)).masked_fill(~self._own(), -torch.inf)
        loss = label_cross_entropy(logits_BC, label_B)
        figures = {"train/loss_nats": loss, "train/accuracy": share_right(logits_BC, label_B)}
        self.log_training(figures, batch_size=len(label_B), prog_bar=True)
        return loss

    def after_optimizer_step(self) -> None:
        """Rows of other tasks are what they were, bit for bit, whatever the optimiser did."""
        for parameter, kept in zip((self.head.weight, self.head.bias), self._kept, strict=True):
            other = ~self._own().view(-1, *[1] * (parameter.ndim - 1))
            parameter.copy_(torch.where(other, kept, parameter))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if batch_idx + 1 in self._ends():  # also after a step that was skipped
            self.finish(self._task_of(batch_idx))

    def finish(self, task: int) -> None:
        """What follows a task's last step: Gaussians of its classes, and the aligned head. All ranks call it."""
        self._learn(task)
        self.aligned_weight.copy_(self.head.weight.detach())
        self.aligned_bias.copy_(self.head.bias.detach())
        if task and self.alignment.epochs:
            self.align(task)
        self.done.fill_(task + 1)

    @torch.no_grad()
    def _learn(self, task: int) -> None:
        """From the training images of the task as they are, those of all ranks."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        classes = (self.task_C == task).nonzero()[:, 0].tolist()
        nothing = Moments.of(self.head.weight.new_zeros(0, self.head.in_features))
        moments = dict.fromkeys(classes, nothing)
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            for batch in data.task_bank(task):
                batch = self.trainer.precision_plugin.convert_input(batch)
                batch = self.trainer.strategy.batch_to_device(batch, self.device)
                with self.trainer.precision_plugin.forward_context():
                    x_BF, label_B = self.features(batch), labels_of(batch, "SLCA")
                for number in classes:
                    moments[number] += Moments.of(x_BF[label_B == number])
        finally:
            for part, training in modes:
                part.training = training
        for number in classes:
            self.gaussians.learn(number, moments[number].over_ranks())

    @torch.no_grad()
    def align(self, task: int) -> None:
        """Trains the copy of the head on samples of all classes so far: the same on every rank, of the same state.

        Raises: UserError for a head that has diverged.
        """
        head = self.head.weight, self.head.bias
        seen_C, weight, bias = self.alignment.rows(*head, self.gaussians, self.task_C, task)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(
                f"SLCA's alignment after task {task} has diverged with align_lr={self.alignment.lr}; lower it"
            )
        # Replicas compute the same, but another processor may round the last bit differently.
        self.aligned_weight[seen_C] = agreed(weight).to(self.aligned_weight)
        self.aligned_bias[seen_C] = agreed(bias).to(self.aligned_bias)

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Logits [B C]."""
        return self(image_of(batch, "SLCA"))

    def _evaluate(self, stage: str, batch: ImageBatch) -> None:
        """Among all classes that have come so far."""
        logits_BC, label_B = self(image_of(batch, "SLCA")), labels_of(batch, "SLCA")
        accuracy = share_right(logits_BC, label_B)
        self.log(f"{stage}/accuracy", accuracy, batch_size=len(label_B), sync_dist=True, prog_bar=True)

    def _ends(self) -> list[int]:
        """Micro-batches until each of several tasks has ended."""
        share = self.trainer.accumulate_grad_batches
        return [share * steps for steps in accumulate(self._steps)]

    def _task_of(self, batch_idx: int) -> int:
        return bisect_right(self._ends(), batch_idx)
