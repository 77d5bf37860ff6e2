"""Groups of one class side by side, which grow by epoch: what is in a batch, on a rank, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.sets.shapes import Shapes
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import ClassGroups, GroupSizes
from lightspan.datamodules.rendered.persons import Persons

LABELS = np.repeat(np.arange(9), [8, 8, 8, 8, 8, 8, 8, 3, 1])
GROWING = GroupSizes((2, 4), (0, 3))


def order(labels: np.ndarray = LABELS, batch: int = 16, groups: GroupSizes = GROWING) -> ClassGroups:
    return ClassGroups((len(labels),), labels=labels, batch_size=batch, groups=groups)


def batches(of: ClassGroups, epoch: int = 0, seed: int = 0) -> list[np.ndarray]:
    drawn, count = of.epoch(seed, epoch), len(of) // of.batch_size
    assert len(drawn) == len(of)
    return np.split(drawn[: count * of.batch_size], count)


@pytest.mark.parametrize(("epoch", "size"), [(0, 2), (2, 2), (3, 4), (500, 4)])
def test_a_batch_is_of_whole_groups_of_different_classes_with_distinct_samples(epoch: int, size: int) -> None:
    for batch in batches(order(), epoch):
        groups = batch.reshape(-1, size)
        labels = LABELS[groups]
        assert (labels == labels[:, :1]).all()
        assert len(set(labels[:, 0])) == len(labels)
        for group, label in zip(groups, labels[:, 0], strict=True):
            assert len(set(group)) == min(size, (label == LABELS).sum())


def test_it_is_a_function_of_seed_and_epoch_and_every_class_comes_in_turn() -> None:
    of = order()
    assert np.array_equal(of.epoch(0, 1), of.epoch(0, 1))
    assert not np.array_equal(of.epoch(0, 1), of.epoch(0, 2))
    assert not np.array_equal(of.epoch(0, 1), of.epoch(1, 1))
    seen = np.concatenate([LABELS[batch] for epoch in range(20) for batch in batches(of, epoch)])
    assert set(seen.tolist()) == set(range(9))


class Numbers:
    def __len__(self) -> int:
        return len(LABELS)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        return {"label": int(LABELS[index])}


def test_every_rank_and_micro_batch_has_whole_groups_as_epochs_go_by() -> None:
    loaders = [ExactLoader(Numbers(), 16, rank=rank, world_size=2, accumulate=2, order=order()) for rank in range(2)]
    for epoch in range(5):
        for loader in loaders:
            for batch in loader:
                groups = batch["label"].view(-1, GROWING.at(epoch))
                assert groups.numel() == 4
                assert (groups == groups[:, :1]).all()
    with pytest.raises(UserError, match=r"2 samples at a time do not divide into whole groups of 4; set .*batch_size"):
        ExactLoader(Numbers(), 16, world_size=8, order=order())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a batch of 8 in groups of 2 has 4 classes, .* at least 2 .*, and the data have 1"
    ):
        order(np.zeros(30, np.int64), batch=8)
    with pytest.raises(UserError, match=r"and the data have 1; lower .*batch_size, or give more classes"):
        order(np.zeros(30, np.int64), batch=8, groups=GroupSizes((4,), (0,)))
    with pytest.raises(
        UserError, match=r"a batch of 4 in groups of 4 has a single class, .* to at least 8, or groups .* at most 2"
    ):
        order(batch=4)  # in groups of 2 it has two classes, until they grow
    with pytest.raises(UserError, match="10 samples at a time do not divide into whole groups of 4"):
        order(batch=10)
    for starts in ((1, 2), (0, 0), (0, 5, 3), (), (0,)):
        with pytest.raises(UserError, match="which must begin with 0 and ascend"):
            GroupSizes((2, 4), starts)
    with pytest.raises(UserError, match=r"sizes=\[2, 0\] of groups must each be at least 1"):
        GroupSizes((2, 0), (0, 1))


def test_a_set_of_pictures_has_one_order_or_the_other() -> None:
    data = Shapes(batch_size=20, size=200, groups=GroupSizes((5,), (0,)))
    data.setup()
    for batch in data.train_dataloader():
        groups = batch["label"].view(-1, 5)
        assert (groups == groups[:, :1]).all()
    with pytest.raises(UserError, match=r"per_class=5 and groups=.* are two orders of one set; set one of them"):
        Shapes(per_class=5, groups=GroupSizes((5,), (0,)))


def crops() -> RandomViews:
    return RandomViews(count=2, size=8, scale=(0.3, 1.0))


def persons(**settings: Any) -> Persons:
    small: dict[str, Any] = {"tracklets": 2, "frames": 3, "height": 12, "width": 6, "batch_size": 8}
    return Persons(**small | {"size": 12, "val_size": 2, "test_size": 2} | settings)


@pytest.mark.parametrize("views_on", ["workers", "device"])
def test_persons_have_groups_of_a_label_with_crops_of_their_own(views_on: Any) -> None:
    data = persons(views=crops(), views_on=views_on, groups=GroupSizes((4,), (0,)), wrong=0.5)
    data.setup()
    loader = data.train_dataloader()
    for batch in loader:
        batch = data.on_after_batch_transfer(batch, 0)
        groups = batch["label"].view(2, 4)
        assert (groups == groups[:, :1]).all()
        assert [view.shape for view in batch["views"]] == [(8, 3, 8, 8)] * 2
        assert batch["identity"].shape == batch["camera"].shape == (8,)
    assert any(bool((batch["identity"] != batch["label"]).any()) for batch in data.train_dataloader())
    (first, *_) = data.bank_dataloader()
    assert first["image"].shape == (8, 3, 12, 6)


def test_a_whole_batch_of_persons_has_the_views_of_its_samples() -> None:
    data = persons(views=crops())
    data.setup()
    together = data.train.batch([5, 1], [11, 7])  # type: ignore[union-attr]
    for row, (index, seed) in enumerate(((5, 11), (1, 7))):
        single = data.train.sample(index, seed)  # type: ignore[union-attr]
        assert all(torch.equal(a[row], b) for a, b in zip(together["views"], single["views"], strict=True))
    with pytest.raises(UserError, match="together=2 puts pictures of a label into one row, and views and groups are"):
        persons(together=2, groups=GroupSizes((2,), (0,)))
