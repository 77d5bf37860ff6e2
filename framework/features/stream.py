"""Features of classes that come task by task."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule
from torch import nn

from lightspan.errors import UserError
from lightspan.features.encoded import Encoded
from lightspan.features.features import Features, Input
from lightspan.features.store import FeatureStore


@dataclass(frozen=True)
class FeatureStream:
    """What a learner that sees one task after the other trains and is tested on.

    Attributes:
        bank, query: features of all training and of all test samples.
        tasks: the classes of each task, in the order in which they come.
    """

    bank: Features
    query: Features
    tasks: tuple[tuple[int, ...], ...]

    def of_task(self, features: Features, task: int) -> Features:
        """Those of the samples of one task."""
        rows = torch.isin(features.classes(), torch.tensor(self.tasks[task], dtype=torch.int64)).nonzero()[:, 0]
        label_N, index_N = features.classes()[rows], None if features.index_N is None else features.index_N[rows]
        return Features(features.x[rows], label_N, index_N)


class EncodedStream(Input):
    """What an encoder makes of a stream of classes: the whole sets come from the feature store, and tasks divide them.

    Args:
        encoder, settings: as in `lightspan.features.encoded.Encoded`.
        data: has `tasks`, as `lightspan.datamodules.images.class_stream.ClassStream`.
    """

    def __init__(self, encoder: nn.Module, data: LightningDataModule, **settings: Any) -> None:
        tasks = getattr(data, "tasks", None)
        if tasks is None:
            raise UserError(
                f"EncodedStream needs data with tasks, and {type(data).__name__} has none; take "
                "lightspan.datamodules.images.class_stream.ClassStream"
            )
        self.tasks = tuple(tuple(task) for task in tasks)
        self.bank, self.query = (Encoded(encoder, data, split, **settings) for split in ("bank", "test"))

    def load(self, store: FeatureStore) -> FeatureStream:
        return FeatureStream(self.bank.load(store), self.query.load(store), self.tasks)

    def outlook(self, store: FeatureStore) -> str:
        return f"{len(self.tasks)} tasks; {self.bank.outlook(store)}; {self.query.outlook(store)}"
