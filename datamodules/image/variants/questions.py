"""Image sets as many tasks with one number as the answer: is this picture one of that class?

Shapes: N images, S sets, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import QuestionBatch
from lightspan.datamodules.image.sets.small import ImageData
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SplitSampleSets
from lightspan.datamodules.loading.workers import Dataset


class AskedImages:
    """Samples of `QuestionBatch`: those of several sets, one after the other, each with one question.

    An image is asked by the task of its own class half of the time, and else by that of another class at random.

    Args:
        sets: whose samples have `image`.
        labels: of the images of each set, int64 [N].
        classes: C; the task of class c of set s has the number s C + c.
        seed: of the questions.
    """

    batch_type = QuestionBatch

    def __init__(self, sets: Sequence[Dataset], labels: Sequence[np.ndarray], classes: int, seed: int) -> None:
        self.sets, self.ends = sets, np.cumsum([len(one) for one in sets])
        label_N, set_N = np.concatenate(labels), np.repeat(np.arange(len(sets)), [len(one) for one in sets])
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 4])))
        yes_N = generator.random(len(label_N)) < 0.5
        other_N = (label_N + generator.integers(1, classes, len(label_N))) % classes
        self.task_N = set_N * classes + np.where(yes_N, label_N, other_N)
        self.target_N = np.where(yes_N, 1.0, -1.0).astype(np.float32)

    def __len__(self) -> int:
        return len(self.task_N)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        at = int(np.searchsorted(self.ends, index, side="right"))
        image = self.sets[at].sample(index - int(self.ends[at]) + len(self.sets[at]), seed)["image"]
        task, target = torch.tensor(self.task_N[index]), torch.tensor(self.target_N[index])
        return {"image": image, "task": task, "target": target, "index": torch.tensor(index)}


class YesNoTasks(SplitSampleSets):
    """Batches are `QuestionBatch`. Of S sets of C classes there are S C tasks, for methods that learn from many tasks,
    and for choosing which of them to label (`lightspan.selection.task_budget`).

    Args:
        sets: by name, of one shape of image and as many classes, such as one set and what
            `lightspan.datamodules.image.variants.tasks.Derived` makes of it. Their views and orders count for nothing.
        ask_seed: of the questions.
        settings: those of `SampleSets`.
    """

    def __init__(self, sets: dict[str, ImageData], ask_seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        require_in("[0, inf)", ask_seed=ask_seed)
        kinds = {name: (data.image_shape, data.num_classes) for name, data in sets.items()}
        if not sets or len(set(kinds.values())) > 1 or next(iter(kinds.values()))[1] < 2:
            raise UserError(
                f"YesNoTasks needs sets of one shape of image and at least two classes, as many, not {kinds}"
            )
        self.sets, self.ask_seed = sets, ask_seed
        self.num_classes = next(iter(sets.values())).num_classes

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        for data in self.sets.values():
            data.setup(stage)
        parts = [[getattr(data, part) for data in self.sets.values()] for part in ("bank", "val", "test")]
        asked = [AskedImages(own, [one.labels() for one in own], self.num_classes, self.ask_seed) for own in parts]
        self.train, (self.bank, self.val, self.test) = asked[0], asked
        say(f"questions: {len(self.sets) * self.num_classes} tasks, {len(self.train):,} training images, one each")

    def training_content(self) -> str:
        assert isinstance(self.train, AskedImages)
        return content_of([self.train.task_N, self.train.target_N])
