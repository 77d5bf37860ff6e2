"""Features of samples that come task by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning import LightningDataModule
from torch import nn

from lightspan.core.errors import UserError
from lightspan.evaluation.features.encoded import Encoded
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


@dataclass(frozen=True)
class FeatureStream:
    """What a learner that sees one task after the other trains and is tested on.

    Attributes:
        banks, queries: features of the training and of the test samples of each task, in the order in which they come.
    """

    banks: tuple[Features, ...]
    queries: tuple[Features, ...]

    @classmethod
    def by_class(cls, bank: Features, query: Features, tasks: Sequence[Sequence[int]]) -> "FeatureStream":
        """Tasks that have these classes, of two whole sets."""
        banks, queries = (tuple(features.of_classes(task) for task in tasks) for features in (bank, query))
        return cls(banks, queries)


class EncodedStream(Input):
    """What an encoder makes of a stream of classes: the whole sets come from the feature store, and tasks divide them.

    Args:
        encoder, settings: as in `lightspan.evaluation.features.encoded.Encoded`.
        data: has `tasks`, as `lightspan.datamodules.image.variants.class_stream.ClassStream`.
    """

    def __init__(self, encoder: nn.Module, data: LightningDataModule, **settings: Any) -> None:
        tasks = getattr(data, "tasks", None)
        if tasks is None:
            raise UserError(
                f"EncodedStream needs data with tasks, and {type(data).__name__} has none; take "
                "lightspan.datamodules.image.variants.class_stream.ClassStream"
            )
        self.tasks = tuple(tuple(task) for task in tasks)
        self.bank, self.query = (Encoded(encoder, data, split, **settings) for split in ("bank", "test"))

    def load(self, store: FeatureStore) -> FeatureStream:
        return FeatureStream.by_class(self.bank.load(store), self.query.load(store), self.tasks)

    def outlook(self, store: FeatureStore) -> str:
        return f"{len(self.tasks)} tasks; {self.bank.outlook(store)}; {self.query.outlook(store)}"


class EncodedSessions(Input):
    """What an encoder makes of one data set after the other: sessions of the same classes in other domains, or of new
    ones.

    Args:
        encoder, settings: as in `lightspan.evaluation.features.encoded.Encoded`.
        sessions: data of each, in the order in which they come. Their labels mean the same.
    Raises: UserError without a session.
    """

    def __init__(self, encoder: nn.Module, sessions: list[LightningDataModule], **settings: Any) -> None:
        if not sessions:
            raise UserError("EncodedSessions sessions=[] has no data; give at least one data module")
        self.banks, self.queries = (
            [Encoded(encoder, data, split, **settings) for data in sessions] for split in ("bank", "test")
        )

    def load(self, store: FeatureStore) -> FeatureStream:
        banks, queries = (tuple(each.load(store) for each in sets) for sets in (self.banks, self.queries))
        return FeatureStream(banks, queries)

    def outlook(self, store: FeatureStore) -> str:
        return "; ".join(
            f"session {number}: {bank.outlook(store)}, {query.outlook(store)}"
            for number, (bank, query) in enumerate(zip(self.banks, self.queries, strict=True))
        )
