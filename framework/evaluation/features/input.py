"""Where a computation's inputs come from."""

from abc import ABC, abstractmethod
from typing import Any

from lightspan.evaluation.features.store import FeatureStore


class Input(ABC):
    """Something that a recipe names under `inputs` and a computation takes: features, weights, graphs, tables.

    Settings belong to the constructor, which opens no file; `load` does the work. Every rank calls both.
    """

    @abstractmethod
    def load(self, store: FeatureStore) -> Any:
        """What `fit` gets. Raises: UserError for what cannot be read or computed."""

    def outlook(self, store: FeatureStore) -> str:
        """What `load` would do, in a few words, without doing it: for --dry-run."""
        return f"{type(self).__name__}, not inspected"
