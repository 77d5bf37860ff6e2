"""SoftCon: contrast whose pairs are as similar as their land cover, from the weights of another kind of images.

Source: Wang, Albrecht, Zhu, "Multi-Label Guided Soft Contrastive Learning for Efficient Earth Observation Pretraining",
IEEE TGRS 2024, arXiv 2405.20462. Of two views of a scene the student sees one with hidden patches (siamese masking), a
teacher that follows it the other one whole:

    L = instance contrast + soft_weight * soft contrast,

both in `lightspan.objectives.soft_contrast`. Each view is query and key in turn, as in MoCo v3. Continual pre-training
starts from a network for colours whose first layer is replaced: `lightspan.backbones.bands.other_bands`.
The code of pre-training is not public. Assumed: the weight of the soft term (1), the temperature (0.2), the share of
hidden patches (0.3) and the teacher's momentum (0.99 to 1, MoCo v3's); hidden patches are zero, the mean of their band;
both terms are means over the two directions.
Shapes: B scenes of this rank, C h w, G tags, D embedding width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.ranges import require_temperatures, require_weights
from lightspan.datamodules.image.batch import TaggedViewsBatch
from lightspan.datamodules.multispectral.batch import SeasonsBatch
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.masking.mask_samplers import MaskSampler, RandomMasks
from lightspan.nn.sequences.patches import grid_of
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.tags import tags_of
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.views import global_first
from lightspan.nn.widths import require_predictor, require_projector
from lightspan.objectives.soft_contrast import soft_contrast
from lightspan.optim.schedules import TeacherMomentum
from lightspan.training.method import Method


class SoftCon(Method):
    """Instance contrast and soft contrast of two views, with the tags of their scenes. The student is what is kept.

    Few tags make most pairs alike, which pulls all features together: the instance term holds them apart, and
    `lightspan.callbacks.watching.collapse_sentinel` says if it does not. A scene without a tag takes part in the
    instance term alone; a tag that is not known counts as one that does not hold.

    Args:
        backbone: the student's, [B C h w] -> [B num_features]; the teacher is a copy.
        projector: [B num_features] -> [B D], copied too.
        predictor: [B D] -> [B D], the student's alone, as MoCo v3 has it; None does without, as MoCo does with a
            ResNet.
        soft_weight: of the soft term, >= 0. At 0 only scenes tell apart, and tags have no say.
        patch: sides of what is hidden at once, in pixels; of a transformer those of its patches.
        masks: which patches of the student's views are hidden; None hides 0.3 of them.
        temperature: T > 0.
        momentum, final_momentum: of the teacher, in [0, 1], on a half cosine over the run.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.0", "The student's, which gives the features.")
    projector = submodule_alias("student.1", "The student's, which gives the embeddings.")
    keeps_apart = "there are enough negatives (data.init_args.batch_size) and temperature fits"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module | None = None,
        soft_weight: float = 1.0,
        patch: tuple[int, ...] = (16, 16),
        masks: MaskSampler | None = None,
        temperature: float = 0.2,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_weights(soft_weight=soft_weight)
        require_projector(backbone, projector)
        if predictor is not None:
            require_predictor(projector, predictor)
        self.temperature, self.soft_weight, self.patch = temperature, soft_weight, patch
        self.momentum = TeacherMomentum(momentum, final_momentum)
        self.hide = GroupCorruption(masks or RandomMasks(0.3), alien=0.0, fill="zeros")
        self.student, self.predictor = nn.Sequential(backbone, projector), predictor or nn.Identity()
        self.teacher = EMATeacher(self.student, batch_statistics=True)

    def training_step(self, batch: TaggedViewsBatch | SeasonsBatch, batch_idx: int) -> Tensor:
        views, index_B = global_first(batch, "SoftCon", 2)[:2], index_in(batch, self)
        hold_BG = tags_of(batch, "SoftCon").hold_BG
        keys = [self.teacher(view_BChw) for view_BChw in reversed(views)]
        queries = [self.predictor(self.student(seen)) for seen in self.masked(views, index_B)]
        pairs = [soft_contrast(*pair, hold_BG, self.temperature) for pair in zip(queries, keys, strict=True)]
        instance, soft = (torch.stack(both).mean() for both in zip(*pairs, strict=True))
        loss = instance + self.soft_weight * soft
        self.log_training({"train/loss": loss, "train/instance_nats": instance, "train/soft_nats": soft})
        return loss

    def masked(self, views: list[Tensor], index_B: Tensor) -> list[Tensor]:
        """What the student sees of each view: patches drawn by seed, step, scene and view are zero."""
        grid, step = grid_of(views[0].shape[2:], self.patch), self.global_step
        hide = partial(self.hide, grid=grid, index_B=index_B, step=step)
        return [hide(view_BChw, view=number)[0] for number, view_BChw in enumerate(views)]

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum(self.share_of_run()))
