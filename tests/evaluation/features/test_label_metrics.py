"""Label metrics that a recipe names: what is loaded, and what is refused."""

from pathlib import Path

import pytest
import torch
from label_trees import every
from optional import skip_without_packages
from safetensors.torch import save_file
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.label_distances import (
    LabelDistances,
    LabelGraph,
    LabelRing,
    LabelTexts,
    LabelTree,
    WordNetTree,
)
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.label_spaces.label_metrics import LabelMetric

PARENTS = {"boot": "shoe", "sandal": "shoe", "shoe": "thing", "bag": "thing"}


class Given(Input):
    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.features = Features(x, label)

    def load(self, store: FeatureStore) -> Features:
        return self.features


def loaded(one: Input) -> LabelMetric:
    return one.load(FeatureStore("unused"))


def steps(metric: LabelMetric) -> list[list[float]]:
    return every(metric).sqrt().tolist()


def test_trees_and_graphs_have_the_classes_first() -> None:
    classes = ["bag", "boot", "sandal"]
    assert steps(loaded(LabelTree(PARENTS, classes))) == [[0, 3, 3], [3, 0, 2], [3, 2, 0]]
    whole = loaded(LabelTree(PARENTS, classes, only_classes=False))
    assert whole.names == ("bag", "boot", "sandal", "shoe", "thing")
    graph = LabelGraph([["a", "b"], ["b", "c"], ["a", "c"]], [1.0, 2.0, 4.0], ["c", "a"])
    assert steps(loaded(graph)) == [[0, 3], [3, 0]]
    assert steps(loaded(LabelRing(4)))[0] == [0, 1, 2, 1]


def test_texts_are_averaged_at_length_one() -> None:
    texts = Given(torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1, 0, 1]))
    metric = loaded(LabelTexts(texts, ["east", "north"]))
    assert metric.names == ("east", "north")
    assert every(metric)[0, 1].item() == pytest.approx(2)
    with pytest.raises(UserError, match="class 1 has no text"):
        loaded(LabelTexts(Given(torch.ones(2, 2), torch.tensor([0, 2]))))


def test_a_matrix_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    save_file({"distance": torch.tensor([[0.0, 3.0], [3.0, 0.0]])}, file)
    assert steps(loaded(LabelDistances(str(file)))) == [[0, 3], [3, 0]]
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="is no safetensors file with a `distance`"):
        loaded(LabelDistances(str(file)))
    with pytest.raises(UserError, match="there are no label distances at"):
        loaded(LabelDistances(str(tmp_path / "none")))


@pytest.mark.sweep
def test_wordnet_has_nouns_and_the_classes_of_imagenet() -> None:
    with skip_without_packages():
        metric = loaded(WordNetTree(["dog", "wolf"]))
    assert steps(metric) == [[0, 2], [2, 0]]
    imagenet = loaded(WordNetTree("imagenet-1k"))
    assert len(imagenet) == 1000
    assert imagenet.names[0] == "n01440764"
    with pytest.raises(UserError, match="classes='cifar' is no set of timm"):
        loaded(WordNetTree("cifar"))


def test_what_is_no_tree_is_refused() -> None:
    with pytest.raises(UserError, match="parents of 3 nodes make no tree of 3"):
        loaded(LabelTree({"a": "b", "b": "c", "c": "a"}, ["a"]))
    with pytest.raises(UserError, match="no edge of the graph names the label 'hat'"):
        loaded(LabelTree(PARENTS, ["hat"]))
