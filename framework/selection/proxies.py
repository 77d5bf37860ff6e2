"""What a mixture is worth: the loss on a target of a small model that is trained on the mixture.

Shapes: N training samples, M proxies.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.distributed import rank, world_size
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore, Rows


class Losses(NamedTuple):
    """Of one model on both halves of a target: one that a search may look at, and one to report."""

    searched: float
    reported: float


class TrainedOn(NamedTuple):
    """A proxy whose data are read.

    Attributes:
        identity: what its losses depend on besides mixture and seed, as plain data.
        losses: of a model that is trained on a mixture, a function of both.
    """

    identity: dict[str, Any]
    losses: Callable[[DataSelection, int], Losses]


@dataclass(frozen=True)
class MixtureLosses:
    """The losses of a proxy, from the store, or computed if they are not there."""

    proxy: TrainedOn
    store: FeatureStore

    def of(self, selections: Sequence[DataSelection], seeds: Sequence[int]) -> np.ndarray:
        """Of each selection with its seed, float64 [M 2]: searched and reported. Ranks share the proxies.

        Raises: UserError for a loss that is not finite.
        """
        content = [[selection.digest, seed] for selection, seed in zip(selections, seeds, strict=True)]
        key = {
            "losses of proxies": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "proxy": self.proxy.identity,
        }

        def computed(done: set[int]) -> Iterator[Rows]:
            for number in range(rank(), len(selections), world_size()):
                if number not in done:
                    found = self.proxy.losses(selections[number], seeds[number])
                    row = torch.tensor([found], dtype=torch.float64)
                    yield {"features": row, "index": torch.tensor([number])}

        loss_M2 = self.store.get(key, computed, held_bytes=0).x.numpy()
        if not np.isfinite(loss_M2).all():
            raise UserError(
                f"the loss of a proxy is {loss_M2[~np.isfinite(loss_M2)][0]}, so that mixtures cannot be compared; "
                "check its settings and data"
            )
        return loss_M2


class Proxy(Input):
    """A small model that stands for the one that is to be trained. Its losses are kept in the feature store as soon as
    they are known, so that a search that was interrupted goes on with the proxies that are left.
    """

    def load(self, store: FeatureStore) -> MixtureLosses:
        return MixtureLosses(self.trained_on(), store)

    @abstractmethod
    def trained_on(self) -> TrainedOn:
        """Reads the data."""
