"""MoCo: a view finds the other view of its image, as a slow teacher embeds it, among thousands of earlier ones.

Source: He et al., "Momentum Contrast", CVPR 2020, arXiv 1911.05722 (equations 1 and 2, algorithm 1); Chen et al.,
"Improved Baselines with Momentum Contrastive Learning" (MoCo v2), 2020, arXiv 2003.04297: an MLP as projector, blur and
temperature 0.2. The loss is `lightspan.objectives.info_nce.queued_info_nce`.

Shuffled BatchNorm: the paper shuffles images over GPUs before the teacher sees them, since a BatchNorm by batch lets a
query and its key share the statistics of one group of images, from which the network guesses the pair (section 3.3).
Here the teacher's BatchNorms use an average of the student's running statistics, as in Cai et al., "Exponential Moving
Average Normalization" (EMAN), 2021, arXiv 2101.08482: a key depends on its own image alone, there is nothing to
shuffle, and any number of ranks trains as one; `batch_statistics` chooses. Places of the queue that are still empty are
zero vectors, with cosine 0 to every query; the authors' are random ones, whose cosines are near 0.
Shapes: B images of this rank, C H W image, D embedding width, L rows in the queue.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.ranges import require_shares, require_temperatures
from lightspan.nn.heads.projector import Projector
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.feature_queue import FeatureQueue
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector
from lightspan.objectives.info_nce import queued_info_nce, unit
from lightspan.training.method import Method


class MoCo(Method):
    """Contrast with a queue: the number of negatives is independent of the batch size. The student is what is kept.

    The keys of a step enter the queue once the step is taken, those of all ranks and all its micro-batches together, so
    that N ranks and accumulated gradients train as one rank with the whole batch (with sync_batchnorm).

    Args:
        backbone: the student's, [B C H W] -> [B num_features]; the teacher is a copy.
        projector: [B num_features] -> [B D], copied too.
        queue: L, best a multiple of the global batch.
        momentum: of the teacher, in [0, 1].
        temperature: > 0.
        batch_statistics: normalise the teacher by its own batches, unshuffled. A short run gains by it: an average that
            starts at nothing is wrong for the first 1 / (1 - momentum) steps and more. A long one may learn to tell
            pairs by their batch, unless the network has no BatchNorm.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("student.0", "The student's, which gives the features.")
    projector = submodule_alias("student.1", "The student's, which gives the embeddings.")
    keeps_apart = "queue is long enough, momentum near 1, and temperature fits"

    def __init__(
        self,
        backbone: nn.Module,
        projector: Projector,
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        batch_statistics: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_shares(momentum=momentum)
        require_projector(backbone, projector)
        self.student = nn.Sequential(backbone, projector)
        self.teacher = EMATeacher(self.student, batch_statistics, average_statistics=True)
        self.queue = FeatureQueue(queue, projector.out_features)
        self.momentum, self.temperature = momentum, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x1_BCHW, x2_BCHW = views_of(batch, "MoCo", 2)
        query_BD, key_BD = self.student(x1_BCHW), unit(self.teacher(x2_BCHW))
        loss = queued_info_nce(query_BD, key_BD, self.queue.rows_LD, self.temperature)
        self.queue.see(key_BD, self.global_step)
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum)
        self.queue.follow()
