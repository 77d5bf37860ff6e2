"""What a learner of one task after the other knows of each, after each: a torchmetrics Metric.

Shapes: B rows of a batch, C classes, T tasks.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightspan.core.errors import UserError


class TaskAccuracy(Metric):
    """Shares of right answers on each task after each task, and from them average accuracy and forgetting.

    Counts are whole numbers, summed over ranks. A row that `compute` gives is NaN where nothing was counted.

    Args:
        tasks: T, at least 1.
        options: of torchmetrics.Metric.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    right_TT: Tensor
    rows_TT: Tensor

    def __init__(self, tasks: int, persistent: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if tasks < 1:
            raise UserError(f"TaskAccuracy tasks={tasks} must be at least 1")
        for name in ("right_TT", "rows_TT"):
            empty = torch.zeros(tasks, tasks, dtype=torch.int64)
            self.add_state(name, empty, dist_reduce_fx="sum", persistent=persistent)

    def update(self, scores_BC: Tensor, label_B: Tensor, after: int, on: int) -> None:
        """Counts the rows whose largest score is that of their label.

        Args:
            scores_BC: what the learner answers when it has learned task number `after`, to samples of task `on`; leave
                classes that it has not seen at minus infinity.
        Raises: UserError for tasks that are not there, or another number of labels than rows.
        """
        tasks = len(self.rows_TT)
        if not 0 <= after < tasks or not 0 <= on < tasks or len(scores_BC) != len(label_B):
            raise UserError(
                f"TaskAccuracy of {tasks} tasks got {len(label_B)} labels of {len(scores_BC)} rows, after task {after} "
                f"on task {on}"
            )
        self.right_TT[after, on] += (scores_BC.argmax(dim=1) == label_B).sum()
        self.rows_TT[after, on] += len(label_B)

    def compute(self) -> Tensor:
        """[T T], after each task and on each, in [0, 1]."""
        return self.right_TT / self.rows_TT.double()
