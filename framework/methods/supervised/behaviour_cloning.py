"""Behaviour cloning: what an expert does, from what it sees.

Source: Pomerleau, "ALVINN", 1988; as a way to pretrain, the baseline of Brandfonbrener et al., 2023, arXiv 2305.16985.
With phi the backbone and o the image:
L = mean over samples and numbers of (pi(phi(o_t)) - a_t)^2
or, of numbered actions, the cross-entropy of pi. Trained on many tasks without being told which, it learns what experts
do on average, for which it may leave out of phi what only a task's own expert attends to.
Shapes: B batch of this rank, C H W image, D features, A numbers of an action or actions to choose from.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightspan.nn.heads.action_head import ActionHead
from lightspan.nn.views import image_of
from lightspan.nn.widths import require_width
from lightspan.objectives.actions import action_figures
from lightspan.training.method import Method


class BehaviourCloning(Method):
    """Trains a backbone and a policy to do what a demonstration does. Batches are those of
    `lightspan.datamodules.worlds.batch`; the later image is not read.

    Args:
        backbone: [B C H W] -> [B D]; in `lightspan.nn.teachers.frozen.Frozen`, one that was pretrained stays as it is.
        head: the policy, [B D] -> [B A].
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a head of another width; in training for actions out of the head's range.
    """

    def __init__(self, backbone: nn.Module, head: ActionHead, **optimization: Any) -> None:
        super().__init__(**optimization)
        require_width(backbone, "head.in_features", head.in_features)
        self.backbone, self.head = backbone, head

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping) and "action" in batch:  # features are taken of images alone, too
            self.head.read(batch, "BehaviourCloning")  # here its numbers are still on the host
        return batch

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """What the policy does, [B A]: numbers, or logits."""
        return self.head(self.backbone(image_BCHW))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        figures = self._measure(batch)
        self.log_training({f"train/{name}": value for name, value in figures.items()}, prog_bar=True)
        return next(iter(figures.values()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        figures = {f"val/{name}": value for name, value in self._measure(batch).items()}
        self.log_dict(figures, batch_size=len(batch["action"]), sync_dist=True, prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As `forward`."""
        return self(image_of(batch, "BehaviourCloning"))

    def _measure(self, batch: Any) -> dict[str, Tensor]:
        guess_BA = self(image_of(batch, "BehaviourCloning"))
        return action_figures(guess_BA, self.head.read(batch, "BehaviourCloning"))
