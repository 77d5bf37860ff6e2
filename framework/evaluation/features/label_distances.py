"""Metrics of labels as inputs of a recipe: trees and graphs that a user writes down, WordNet, texts, and files.

The classes of the data are the first labels, in the order of their numbers.
"""

from collections.abc import Sequence

import torch

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import stored_tensors
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.label_spaces.label_metrics import (
    EmbeddingMetric,
    GraphMetric,
    LabelMetric,
    MatrixMetric,
    ring,
)
from lightspan.evaluation.label_spaces.wordnet import read_nouns, wordnet_tree


class LabelTree(Input):
    """A tree that the recipe writes down: the number of edges between labels.

    Args:
        parents: what is directly above each node but the root, by name.
        classes: names of the classes of the data, in the order of their numbers; other nodes are labels behind them.
        only_classes: nothing but a class is predicted; else nodes above them are labels too, in the middle of the tree,
            where Loki goes that is not sure.
    """

    def __init__(self, parents: dict[str, str], classes: Sequence[str], only_classes: bool = True) -> None:
        self.parents, self.classes, self.only_classes = dict(parents), list(classes), only_classes

    def load(self, store: FeatureStore) -> GraphMetric:
        """Raises: UserError for what is no connected tree, or classes that are not in it."""
        metric = GraphMetric([*self.parents.items()], labels=self.classes, only_labels=self.only_classes)
        if len(metric.edges) != len(metric.nodes) - 1:
            raise UserError(
                f"parents of {len(metric.edges)} nodes make no tree of {len(metric.nodes)}; remove the cycle"
            )
        return metric


class LabelGraph(Input):
    """A graph that the recipe writes down: lengths of shortest paths between labels.

    Args:
        edges: pairs of names.
        lengths: of the edges, above 0; None for 1 each.
        classes: as in `LabelTree`; None takes nodes in the order in which the edges name them.
        only_classes: as in `LabelTree`.
    """

    def __init__(
        self,
        edges: list[list[str]],
        lengths: list[float] | None = None,
        classes: list[str] | None = None,
        only_classes: bool = True,
    ) -> None:
        self.edges, self.lengths, self.classes, self.only_classes = edges, lengths, classes, only_classes

    def load(self, store: FeatureStore) -> GraphMetric:
        """Raises: UserError as `lightspan.evaluation.label_spaces.label_metrics.GraphMetric`."""
        return GraphMetric(self.edges, self.lengths, self.classes, self.only_classes)


class LabelRing(Input):
    """Labels on a circle, such as directions or hours: steps the shorter way round.

    Args:
        count: of the labels, at least 3.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def load(self, store: FeatureStore) -> GraphMetric:
        return ring(self.count)


class WordNetTree(Input):
    """The tree of WordNet that classes span.

    Args:
        classes: nouns, or senses of them such as "crane#5"; or one name of a set of timm, such as "imagenet-1k", whose
            classes are meanings in WordNet 3.0.
        only_classes: as in `LabelTree`.
        folder: with data.noun and index.noun; None means the system package wordnet-base.
    """

    def __init__(self, classes: list[str] | str, only_classes: bool = True, folder: ReadPath | None = None) -> None:
        self.classes, self.only_classes, self.folder = classes, only_classes, folder

    def load(self, store: FeatureStore) -> GraphMetric:
        """Raises: UserError without WordNet's files, or for classes that it does not have."""
        return wordnet_tree(self._names(), read_nouns(self.folder), self.only_classes)

    def _names(self) -> list[str]:
        if not isinstance(self.classes, str):
            return list(self.classes)
        from timm.data import ImageNetInfo

        try:
            return list(ImageNetInfo(self.classes).label_names())
        except (AssertionError, ValueError, OSError) as error:
            raise UserError(
                f"WordNetTree classes={self.classes!r} is no set of timm; name one, or a list of nouns"
            ) from error


class LabelTexts(Input):
    """Euclidean distances of what a text encoder makes of the classes' names: of each class's mean, at length 1.
    Nobody need tell more of the classes, and the metric is the encoder's own.

    Args:
        texts: features with classes, such as `lightspan.evaluation.features.class_texts.ClassTexts`.
        names: of the classes; None names them by their numbers.
    """

    def __init__(self, texts: Input, names: list[str] | None = None) -> None:
        self.texts, self.names = texts, names

    def load(self, store: FeatureStore) -> EmbeddingMetric:
        """Raises: UserError for a class without a text."""
        features = self.texts.load(store)
        assert isinstance(features, Features)
        moments = features.moments(by_class=True, unit=True)
        if bool((moments.count_C == 0).any()):
            lacking = int((moments.count_C == 0).nonzero()[0])
            raise UserError(f"class {lacking} has no text, so nobody knows how far it is from others; give it one")
        return EmbeddingMetric(torch.nn.functional.normalize(moments.mean_CD, dim=1), self.names)


class LabelDistances(Input):
    """A matrix of distances, `distance` [N N] in a safetensors file.

    Args:
        path: of the file.
        names: of the labels; None names them by their numbers.
    """

    def __init__(self, path: ReadPath, names: list[str] | None = None) -> None:
        self.path, self.names = path, names

    def load(self, store: FeatureStore) -> LabelMetric:
        """Raises: UserError for a file that is missing or of another kind, or a matrix that is no metric."""
        file = expanded(self.path, "path")
        if not file.is_file():
            raise UserError(
                f"there are no label distances at {file}; write them with safetensors, as `distance` [N, N]"
            )
        distance_NN = stored_tensors(file)[0].get("distance")
        if distance_NN is None:
            raise UserError(f"{file} is no safetensors file with a `distance`; write it as `distance` [N, N]")
        return MatrixMetric(distance_NN, self.names)
