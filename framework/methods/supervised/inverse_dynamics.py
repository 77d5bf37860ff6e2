"""Inverse dynamics pretraining: what was done between two images.

Source: Brandfonbrener et al., "Inverse Dynamics Pretraining Learns Good Representations for Multitask Imitation",
NeurIPS 2023, arXiv 2305.16985, and the authors' code. With phi the backbone, o the images and a the first action
between them:
L = mean over samples and numbers of (f([phi(o_t); phi(o_t+k)]) - a_t)^2
or, of numbered actions, the cross-entropy of f. The task that an agent pursues is not told to either. Without it, what
it does tells little of what it sees; what changes between two images tells what it controls.
How far apart the images are is the data's: where one step shows nothing, such as of a ball that is kicked, take k > 1.
Both images should be cropped alike (`share_views` of the data). The authors' code crops each by itself, which looks
like a movement, unless it is told otherwise.
Shapes: B batch of this rank, C H W image, D features, A numbers of an action or actions to choose from.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.batches import described
from lightspan.core.errors import UserError
from lightspan.nn.heads.action_head import ActionHead
from lightspan.nn.views import image_of
from lightspan.nn.widths import given_features
from lightspan.objectives.actions import action_figures
from lightspan.training.method import Method


class InverseDynamics(Method):
    """Trains a backbone and a head to tell from two images of an agent what it did between them. The backbone is what
    is kept: a policy learns from its features, frozen, and few demonstrations of a new task.

    Batches are those of `lightspan.datamodules.worlds.batch`.

    Args:
        backbone: [B C H W] -> [B D]; both images go through it in one pass.
        head: [B 2 D] -> [B A], of the features of both.
        stop_next: whether the later image's features are a constant, through which nothing learns.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a head of another width; in training for actions out of the head's range.
    """

    def __init__(self, backbone: nn.Module, head: ActionHead, stop_next: bool = False, **optimization: Any) -> None:
        super().__init__(**optimization)
        if (width := given_features(backbone)) is not None and head.in_features != 2 * width:
            raise UserError(
                f"head.in_features={head.in_features}, but two images have {2 * width} features of "
                f"{type(backbone).__name__}; set it to {2 * width}"
            )
        self.backbone, self.head, self.stop_next = backbone, head, stop_next

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping) and "action" in batch:  # features are taken of images alone, too
            self.head.read(batch, "InverseDynamics")  # here its numbers are still on the host
        return batch

    def forward(self, image_BCHW: Tensor, next_BCHW: Tensor) -> Tensor:
        """What the head guesses, [B A]."""
        code_BD, next_BD = self.backbone(torch.cat([image_BCHW, next_BCHW])).chunk(2)
        return self.head(torch.cat([code_BD, next_BD.detach() if self.stop_next else next_BD], dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        figures = self._measure(batch)
        self.log_training({f"train/{name}": value for name, value in figures.items()}, prog_bar=True)
        return next(iter(figures.values()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        figures = {f"val/{name}": value for name, value in self._measure(batch).items()}
        self.log_dict(figures, batch_size=len(batch["action"]), sync_dist=True, prog_bar=True)

    def _measure(self, batch: Any) -> dict[str, Tensor]:
        image_BCHW, next_BCHW = images_of(batch)
        return action_figures(self(image_BCHW, next_BCHW), self.head.read(batch, "InverseDynamics"))


def images_of(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The images before and after the action. Raises: UserError for a batch without either, or of two kinds."""
    image_BCHW, next_BCHW = image_of(batch, "InverseDynamics"), batch.get("next_image")
    wanted = image_BCHW.shape, image_BCHW.dtype
    if not isinstance(next_BCHW, Tensor) or (next_BCHW.shape, next_BCHW.dtype) != wanted:
        raise UserError(
            f"InverseDynamics needs a later image of each sample as next_image, like image "
            f"{described(image_BCHW)}, and this batch gives {described(next_BCHW)}; take data of an agent, such as "
            "those of lightspan.datamodules.worlds"
        )
    return image_BCHW, next_BCHW
