"""SupReMix: contrast for regression, with harder pairs mixed from embeddings.

Source: Wu et al., "Mixup Your Own Pairs", 2023, arXiv 2309.16633; the loss is `lightspan.objectives.supremix`. After it
the paper drops the projector and fits a linear regressor, or fine-tunes. Assumed, since neither paper nor code is clear
on it: one share l of Beta(2, 8) for each anchor and step. Shares and the places of pairs are functions of seed, step,
sample and view: ranks and resumed runs draw the same.
Shapes: B samples of this rank, V views of each, R = B V rows, D embedding width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.devices import has_values
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_temperatures
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.labels import targets_of
from lightspan.nn.views import require_one_size, views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.supremix import supremix
from lightspan.training.method import Method


class SupReMix(Method):
    """Embeddings in the order of a number: its equals and what is mixed to it are near, others the farther the more it
    differs. Rows are those of all ranks; with sync_batchnorm N ranks train as one. With `most_pairs` they may take
    other pairs among those of equal targets, which stand in the order of ranks.

    The number is `target` of a batch, or `label` where there is none: then classes in an order.

    Args:
        backbone: rows in, [R num_features] out; what probes read, and all that is kept.
        projector: [R num_features] -> [R D].
        bin_width: targets are rounded to multiples of it, and count in these from here on: equal ones are positives.
        window: in bins, of the pairs that are mixed to positives, >= 0; the paper has 5, of years. 0 mixes none.
        beta: both parameters of the Beta distribution of an anchor's share in its mixed negatives; None mixes none.
        distance_weight: by how much a bin of distance weighs in denominators, >= 0; the paper has 1. With
            0, no beta and no window this is SupCon.
        temperature: > 0.
        most_pairs: pairs that are mixed to positives of one anchor, evenly drawn; None takes all, which of R rows are
            up to R^2 / 4.
        seed: of the shares and of the pairs, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2
    keeps_apart = "a batch has samples of different labels, and temperature fits"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        bin_width: float = 1.0,
        window: float = 5.0,
        beta: tuple[float, float] | None = (2.0, 8.0),
        distance_weight: float = 1.0,
        temperature: float = 0.3,
        most_pairs: int | None = None,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_in("(0, inf)", bin_width=bin_width)
        require_in("[0, inf)", window=window, distance_weight=distance_weight, seed=seed)
        require_in("[1, inf)", most_pairs=most_pairs)
        require_in("(0, inf)", beta=beta)
        require_projector(backbone, projector)
        self.backbone, self.projector = backbone, projector
        self.bin_width, self.window, self.beta, self.distance_weight = bin_width, window, beta, distance_weight
        self.temperature, self.most_pairs, self.seed = temperature, most_pairs, seed

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Raises: UserError for targets that are not one finite number for each sample; NaN would reach all weights."""
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if not isinstance(batch, Mapping) or not batch.keys() & {"target", "label"}:
            return batch  # a step that needs them says so
        target_B = targets_of(batch, "SupReMix")
        if target_B.device.type != "cpu" or not has_values(target_B):
            return batch
        if missing := int((~target_B.isfinite()).sum()):
            raise UserError(
                f"{missing} of {len(target_B)} targets of a batch are NaN or infinite, and SupReMix compares them all; "
                "leave samples without a target out of the data"
            )
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "SupReMix")
        require_one_size(views, "SupReMix")
        target_B = targets_of(batch, "SupReMix", len(views[0]))
        bin_R = (target_B / self.bin_width).round().repeat(len(views))
        z_RD = self.projector(self.backbone(torch.cat(views)))
        share_R, start_R = (drawn_R.to(z_RD.device) for drawn_R in self.draws(index_in(batch, self), len(views)))
        loss = supremix(
            z_RD,
            bin_R,
            None if self.beta is None else share_R,
            self.window,
            self.distance_weight,
            self.temperature,
            self.most_pairs,
            start_R,
        )
        self.log_training({"train/loss": loss})
        return loss

    def draws(self, index_B: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """Of each row in this step: the anchor's share in its mixed negatives, and where its pairs begin, [R] each.

        Args:
            index_B: the samples' numbers in their dataset.
        """
        drawn = np.empty((views, len(index_B), 2), dtype=np.float32)
        for view, rows in enumerate(drawn):
            for row, number in zip(rows, image_numbers(index_B), strict=True):
                generator = np.random.default_rng((self.seed, self.global_step, number, view))
                row[:] = generator.beta(*(self.beta or (1.0, 1.0))), generator.random(dtype=np.float32)
        share_R, start_R = torch.from_numpy(drawn).flatten(0, 1).unbind(1)
        return share_R, start_R
