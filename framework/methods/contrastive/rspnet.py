"""RSPNet: which of two clips of a video plays at the speed of a third one, and which clips are of the same video.

Source: Chen et al., "RSPNet: Relative Speed Perception for Unsupervised Video Representation Learning", AAAI 2021,
arXiv 2011.07949, and the authors' code. Of a video there are two clips, q and k, and k once more at another speed, k'.
In a random half of the batch q and k play at normal speed and k' fast; in the other half the speeds are swapped.
With cosines of a query by the encoder and of keys by its moving average, and tau the temperature:

    motion      L_M = mean relu(margin - (q_M . k_M - q_M . k'_M) / tau)
    appearance  L_A = InfoNCE(q_A, k_A) + InfoNCE(q_A, k'_A), both among the same queue of earlier appearance keys
    L = appearance_weight L_A + motion_weight L_M

As in the code the margin applies to cosines over tau: 2.0 at tau = 0.07 is a gap of 0.14 between cosines (the paper
gives 0.15, from memory), and what enters the queue are the keys of k'. Where the data have several fast speeds, one of
them is drawn for each step. Teacher, queue and the absence of shuffled batches are those of
`lightspan.methods.contrastive.moco`: keys are normalised by averaged statistics, so neither a pair nor a speed can be
told from the batch, and the queue begins with zeros, where the code has noise. The half of the batch is that of all
ranks, and a function of seed, step and samples.
Shapes: B videos of this rank, N of all ranks, S speeds, D width of a head.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.distributed import gather_rows
from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ranges import require_in, require_shares, require_temperatures, require_weights
from lightspan.nn.image_numbers import index_in
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.feature_queue import FeatureQueue
from lightspan.nn.views import require_one_size, views_of
from lightspan.nn.widths import given_width, require_width
from lightspan.objectives.info_nce import queued_info_nce, row_cosine, unit
from lightspan.objectives.margin import ranking_loss
from lightspan.objectives.means import own_mean, weighted_sum
from lightspan.training.method import Method


class TwoHeads(nn.Module):
    """A backbone whose features two heads read: [B ...] -> (appearance [B D], motion [B D])."""

    def __init__(self, backbone: nn.Module, appearance: nn.Module, motion: nn.Module) -> None:
        super().__init__()
        self.backbone, self.appearance, self.motion = backbone, appearance, motion

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(clip)
        return self.appearance(features), self.motion(features)


class Clips(NamedTuple):
    """A query, a key of its speed, and the same key at another speed, [B C T H W] each."""

    query: Tensor
    same: Tensor
    other: Tensor


class RSPNet(Method):
    """Tells speeds apart relative to one another, and videos by their looks. The student's backbone is what is kept.

    The data give 2 S clips of each video, of two starts at the same S >= 2 speeds, those of a start side by side, the
    normal one first, such as `VideoFolder` with clips=2 and speeds=[1, 2].

    Args:
        backbone: the student's, [B C T H W] -> [B num_features]; the teacher is a copy.
        appearance, motion: heads, [B num_features] -> [B D], copied too; in the paper a linear map each.
        queue: length of the queue of appearance keys.
        momentum: of the teacher, in [0, 1].
        temperature: tau > 0.
        margin: by which q . k / tau should exceed q . k' / tau, at least 0.
        appearance_weight, motion_weight: at least 0; with one of them 0 the other task is learned alone.
        batch_statistics: as in MoCo. A batch then holds keys of one speed each way, from which the network may guess.
        seed: of the halves and of the fast speeds, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.backbone", "The student's, which gives the features.")
    projector = submodule_alias("student.appearance", "The student's head by which videos are told apart.")
    keeps_apart = "queue is long enough, momentum near 1, temperature fits, and appearance_weight is above 0"

    def __init__(
        self,
        backbone: nn.Module,
        appearance: nn.Module,
        motion: nn.Module,
        queue: int = 16384,
        momentum: float = 0.999,
        temperature: float = 0.07,
        margin: float = 2.0,
        appearance_weight: float = 1.0,
        motion_weight: float = 1.0,
        batch_statistics: bool = False,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_shares(momentum=momentum)
        require_in("[0, inf)", margin=margin, seed=seed)
        require_weights(appearance_weight=appearance_weight, motion_weight=motion_weight)
        for name, head in (("appearance", appearance), ("motion", motion)):
            require_width(backbone, f"{name}.in_features", getattr(head, "in_features", None))
        self.student = TwoHeads(backbone, appearance, motion)
        self.teacher = EMATeacher(self.student, batch_statistics, average_statistics=True)
        self.queue = FeatureQueue(queue, given_width(appearance))
        self.momentum, self.temperature, self.margin, self.seed = momentum, temperature, margin, seed
        self.weights = {"appearance": appearance_weight, "motion": motion_weight}

    def clips(self, batch: Any) -> Clips:
        """Which clip of each video plays which part in this step. Raises: UserError for other clips than those of two
        starts at two or more speeds.
        """
        views = views_of(batch, "RSPNet")
        if len(views) < 4 or len(views) % 2:
            raise UserError(
                f"RSPNet needs clips of two starts at two or more speeds, and this batch gives {len(views)} of each "
                "video; set data.init_args.clips=2 and data.init_args.speeds=[1,2]"
            )
        require_one_size(views, "RSPNet")
        speeds = len(views) // 2
        fast = int(np.random.default_rng((self.seed, self.global_step)).integers(1, speeds))
        fast_B = self._fast(index_in(batch, self)).view(-1, *[1] * (views[0].ndim - 1))

        def at(start: int, is_fast: Tensor) -> Tensor:
            return torch.where(is_fast, views[start + fast], views[start])

        return Clips(at(0, fast_B), at(speeds, fast_B), at(speeds, ~fast_B))

    def _fast(self, index_B: Tensor) -> Tensor:
        """Whose query plays fast, bool [B]: N // 2 of all ranks' do not."""
        drawn_B = hashed_uniform(mixed_seed(index_B.long(), self.global_step, self.seed), 0, (1,))[:, 0]
        drawn_N, first = gather_rows(drawn_B)
        place_N = drawn_N.argsort(stable=True).argsort()
        return place_N[first : first + len(drawn_B)] >= len(drawn_N) // 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        query, same, other = self.clips(batch)
        query_A, query_M = self.student(query)
        # One pass for each speed, as published: a BatchNorm by batch sees one clip of each video.
        same_A, same_M = self.teacher(same)
        other_A, other_M = self.teacher(other)
        near_B, far_B = (row_cosine(query_M, key_BD) for key_BD in (same_M, other_M))
        found, found_other = (
            queued_info_nce(query_A, key_BD, self.queue.rows_LD, self.temperature) for key_BD in (same_A, other_A)
        )
        losses = {
            "appearance": found + found_other,
            "motion": ranking_loss(near_B / self.temperature, far_B / self.temperature, self.margin),
        }
        loss = weighted_sum(losses, self.weights)
        self.queue.see(unit(other_A), self.global_step)
        told = {"train/speed_accuracy": own_mean((near_B > far_B).float())}
        self.log_training({"train/loss": loss, **{f"train/{name}": part for name, part in losses.items()}, **told})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum)
        self.queue.follow()
