"""Batches of equally many samples of each class, of one cluster after another: what is in them, ranks and resumes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.shapes import Shapes
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import ClassBalanced

LABELS = np.array([0] * 20 + [1] * 9 + [2] * 3 + [3])
CLUSTERS = np.arange(33) % 2


def order(
    labels: np.ndarray = LABELS, clusters: Callable[[int], np.ndarray] | None = None, batch: int = 8, each: int = 4
) -> ClassBalanced:
    return ClassBalanced((len(labels),), labels=labels, batch_size=batch, per_class=each, clusters=clusters)


def batches(of: ClassBalanced, seed: int = 0, epoch: int = 0) -> list[np.ndarray]:
    drawn, count = of.epoch(seed, epoch), len(of) // of.batch_size
    assert len(drawn) == len(of)
    return np.split(drawn[: count * of.batch_size], count)


def test_each_batch_has_as_many_of_each_of_its_classes_and_none_that_has_no_pair() -> None:
    for epoch in range(5):
        for batch in batches(order(), epoch=epoch):
            classes, counts = np.unique(LABELS[batch], return_counts=True)
            assert counts.tolist() == [4, 4]
            assert 3 not in classes  # a single sample
    assert not np.array_equal(order().epoch(0, 0), order().epoch(0, 1))
    assert np.array_equal(order().epoch(0, 1), order().epoch(0, 1))


def test_samples_of_a_class_come_each_once_before_one_comes_again_and_few_ones_repeat_in_a_batch() -> None:
    labels = np.array([0] * 40 + [1] * 3)
    drawn = np.concatenate(batches(order(labels)))
    counts = np.bincount(drawn, minlength=43)
    assert counts[:40].max() == 1  # 5 batches of 4
    assert counts[40:].tolist() in ([7, 7, 6], [7, 6, 7], [6, 7, 7])


def test_each_batch_is_of_one_cluster_and_they_take_turns() -> None:
    asked: list[int] = []

    def clusters(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return CLUSTERS if epoch else np.zeros(33, np.int64)

    of = order(clusters=clusters)
    turns = [set(CLUSTERS[batch].tolist()) for batch in batches(of, epoch=1)]
    assert turns in ([{0}, {1}, {0}, {1}], [{1}, {0}, {1}, {0}])
    assert any(len(set(CLUSTERS[batch].tolist())) == 2 for batch in batches(of))
    assert asked == [1, 0]


def test_a_cluster_without_a_pair_has_no_batch_and_one_class_alone_fills_batches_with_itself() -> None:
    lonely = np.where(np.arange(33) == 32, 1, 0)
    assert all(32 not in batch for batch in batches(order(clusters=lambda epoch: lonely)))
    alone = np.zeros(16, np.int64)
    assert [len(set(batch.tolist())) for batch in batches(order(alone))] == [8, 8]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="no class has two samples to compare"):
        order(np.arange(16)).epoch(0, 0)
    with pytest.raises(UserError, match=r"per_class=3 must be at least 2 and divide batch_size=8"):
        order(each=3)
    with pytest.raises(UserError, match=r"per_class=1 must be at least 2"):
        order(each=1)


def shapes(**settings: Any) -> Shapes:
    data = Shapes(batch_size=20, size=200, per_class=5, **settings)
    data.setup()
    return data


def test_a_set_of_images_has_such_batches_and_two_ranks_see_those_of_one() -> None:
    data = shapes()
    whole = [batch["index"].tolist() for batch in data.train_dataloader()]
    for batch in whole:
        assert np.unique(data.train.labels()[batch], return_counts=True)[1].tolist() == [5] * 4  # type: ignore[union-attr]
    parts = [
        ExactLoader(data.train, 20, data.seed, rank, 2, order=data.training_order())  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert [number for half in halves for number in half["index"].tolist()] == batch


def test_a_resumed_loader_goes_on_within_the_epoch_and_refuses_another_number_of_each_class() -> None:
    loader, fresh = shapes().train_dataloader(), shapes().train_dataloader()
    whole = [batch["index"].tolist() for batch in loader]
    rest = iter(fresh)
    for _ in range(3):
        next(rest)
    resumed = shapes().train_dataloader()
    resumed.load_state_dict(fresh.state_dict())
    assert [batch["index"].tolist() for batch in resumed] == whole[3:]
    other = Shapes(batch_size=20, size=200, per_class=2)
    other.setup()
    with pytest.raises(UserError, match="the checkpoint has data content 5 of each class"):
        other.train_dataloader().load_state_dict(fresh.state_dict())
