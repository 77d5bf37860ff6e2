"""Parts of the training data: nested, with the shares of classes, the same on any ranks, and resumed exactly."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningDataModule
from PIL import Image
from shard_files import write_shards
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.core.errors import UserError
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import ClassBalanced, ClassGroups, GroupSizes, Order
from lightspan.datamodules.loading.ranks import train_loader
from lightspan.datamodules.loading.subset import SubsetOfBatches, SubsetSamples, TrainingSubset, nested_order, subset_of
from lightspan.datamodules.rendered.scene_data import RenderedScenes
from lightspan.datamodules.rendered.scenes import SceneSpace
from lightspan.datamodules.shards.stream import Shards
from lightspan.datamodules.table.rows import Diabetes
from lightspan.datamodules.text.windows import ByteText

SIZES = (16, 24, 40)


class Numbers:
    """Samples 0 to N - 1, in three blocks if they are shards."""

    def __init__(self, count: int = 60) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "seed": torch.tensor(seed)}


def folder(tmp_path: Path) -> ImageFolder:
    for number in range(60):
        place = tmp_path / f"class{number % 3}"
        place.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (4 * number, 0, 0)).save(place / f"{number}.png")
    return ImageFolder(str(tmp_path), size=8, batch_size=8, val_share=0.1)


def text(tmp_path: Path) -> ByteText:
    for name in ("one", "two", "three", "four", "five", "six"):
        (tmp_path / f"{name}.py").write_text("".join(f"{name} {line}\n" for line in range(100)))
    return ByteText([str(tmp_path)], context=15, batch_size=8, val_fraction=0.3, val_windows=2)


KINDS: dict[str, Callable[[Path], LightningDataModule]] = {
    "folder": folder,
    "shards": lambda path: Shards(write_shards(path, [20, 7, 33]), batch_size=8, window=2),
    "text": text,
    "table": lambda path: Diabetes(batch_size=8),
    "rendered": lambda path: RenderedScenes(SceneSpace(8, 8), size=60, val_size=8, test_size=8, batch_size=8),
    "digits": lambda path: Digits(batch_size=8),
}


def trainer_with(*callbacks: Any, rank: int = 0, ranks: int = 1) -> Any:
    """What `train_loader` asks a trainer for."""
    return SimpleNamespace(
        callbacks=list(callbacks),
        distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks},
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def loader_of(data: LightningDataModule, size: int, rank: int = 0, ranks: int = 1, seed: int = 0) -> ExactLoader:
    data.trainer = trainer_with(TrainingSubset(size, seed), rank=rank, ranks=ranks)
    return data.train_dataloader()


def prepared(kind: str, tmp_path: Path) -> LightningDataModule:
    data = KINDS[kind](tmp_path)
    data.setup("fit")  # type: ignore[arg-type]
    return data


def rows(batch: Any) -> list[bytes]:
    """Each sample of a batch as its bytes."""
    fields = [x for x in batch.values() if isinstance(x, Tensor)]
    return [b"".join(x[row].contiguous().numpy().tobytes() for x in fields) for row in range(len(fields[0]))]


@given(labels=st.lists(st.integers(0, 5), max_size=60), seed=st.integers(0, 2**40))
def test_each_part_has_the_classes_in_their_shares_to_within_rounding(labels: list[int], seed: int) -> None:
    label_N = np.array(labels, np.int64)
    order = nested_order(len(label_N), seed, label_N)
    assert sorted(order) == list(range(len(label_N)))
    assert np.array_equal(order, nested_order(len(label_N), seed, label_N))
    share_C = np.bincount(label_N, minlength=6) / max(len(label_N), 1)
    classes = np.count_nonzero(share_C)
    for n in range(1, len(order) + 1):
        count_C = np.bincount(label_N[order[:n]], minlength=6)
        assert (abs(count_C - n * share_C) <= 1 + share_C * classes).all()


def test_equally_frequent_classes_come_equally_often_in_every_part() -> None:
    label_N = np.repeat(np.arange(5), 12)
    order = nested_order(60, 3, label_N)
    for n in range(1, 61):
        assert np.ptp(np.bincount(label_N[order[:n]], minlength=5)) <= 1


def test_a_class_too_rare_for_half_a_sample_is_left_out() -> None:
    label_N = np.repeat([0, 1], [99, 1])
    order = nested_order(100, 0, label_N)
    assert (label_N[order[:49]] == 0).all()
    assert 1 in label_N[order[:51]]


def test_the_draw_is_pinned_so_that_curves_can_be_continued() -> None:
    assert nested_order(8, 0).tolist() == PINNED[0]
    assert nested_order(8, 0, np.array([0, 0, 0, 0, 0, 1, 1, 2])).tolist() == PINNED[1]


PINNED = ([5, 7, 6, 1, 2, 4, 3, 0], [1, 5, 2, 7, 4, 3, 6, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_data_lie_inside_each_other_and_differ_by_seed(kind: str, tmp_path: Path) -> None:
    data = prepared(kind, tmp_path)
    parts = [loader_of(data, size).dataset for size in SIZES]
    chosen = [set(part.chosen.tolist()) for part in parts]
    assert [len(one) for one in chosen] == list(SIZES)
    assert chosen[0] < chosen[1] < chosen[2]
    assert all((np.diff(part.chosen) > 0).all() for part in parts)
    assert set(loader_of(data, SIZES[0], seed=1).dataset.chosen.tolist()) != chosen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_a_part_sees_each_of_its_samples_once_also_over_two_ranks(kind: str, tmp_path: Path) -> None:
    data = prepared(kind, tmp_path)
    size = 20  # of batches of 8: every second epoch ends inside a batch
    alone, pair = loader_of(data, size), [loader_of(data, size, rank, 2) for rank in (0, 1)]
    whole, halves = [[] for _ in range(2)], [[] for _ in range(2)]
    order, seen = [], []
    for _ in range(5):
        for one, first, second in zip(alone, *pair, strict=True):
            whole[0] += rows(one)
            halves[0] += rows(first) + rows(second)
    for epoch, first, last in alone.spans(0, alone.consumed):
        seen += alone.order.epoch(alone.seed, epoch)[first:last].tolist()
        order.append(epoch)
    assert whole[0] == halves[0]
    assert alone.consumed == 80
    assert all(sorted(seen[at : at + size]) == list(range(size)) for at in range(0, 80, size))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_part_goes_on_with_the_next_sample_and_refuses_another_part(kind: str, tmp_path: Path) -> None:
    data = prepared(kind, tmp_path)
    straight, first = loader_of(data, 20), loader_of(data, 20)
    wanted = [rows(batch) for _ in range(4) for batch in straight]
    got = [rows(batch) for _, batch in zip(range(1), first, strict=False)]
    again = loader_of(data, 20)
    again.load_state_dict(first.state_dict())
    got += [rows(batch) for _ in range(4) for batch in again]
    assert got[: len(wanted)] == wanted
    with pytest.raises(UserError, match="data content"):
        loader_of(data, 20, seed=1).load_state_dict(first.state_dict())


def test_shards_of_a_part_are_still_read_a_window_at_a_time(tmp_path: Path) -> None:
    data = prepared("shards", tmp_path)
    loader = loader_of(data, 40)
    assert loader.order.sizes == tuple(np.bincount(np.repeat([0, 1, 2], [20, 7, 33])[loader.dataset.chosen]))
    assert (loader.order.window, loader.order.carries) == (2, True)


def test_validation_and_bank_stay_whole() -> None:
    data = prepared("digits", Path())
    before = len(data.val_dataloader().dataset), len(data.bank_dataloader().dataset)
    loader_of(data, 16)
    assert (len(data.val_dataloader().dataset), len(data.bank_dataloader().dataset)) == before


def test_samples_keep_their_numbers_and_batches_are_made_at_once() -> None:
    data = prepared("rendered", Path())
    part = loader_of(data, 16).dataset
    assert type(part) is SubsetOfBatches
    assert part.batch([0, 3], [0, 0])["index"].tolist() == part.chosen[[0, 3]].tolist()
    assert type(loader_of(prepared("digits", Path()), 16).dataset) is SubsetSamples


def test_classes_are_drawn_by_the_seed_and_the_same_for_each_size() -> None:
    data = prepared("digits", Path())
    found: dict[int, list[list[int]]] = {}
    for seed in (2, 3):
        for size in SIZES:
            data.trainer = trainer_with(TrainingSubset(size, seed, classes=3))
            label_n = data.train_dataloader().dataset.labels()
            classes, counts = np.unique(label_n, return_counts=True)
            assert np.ptp(counts) <= 2  # nearly equal ones in the whole, and so in each part
            found.setdefault(seed, []).append(classes.tolist())
        assert found[seed][0] == found[seed][1] == found[seed][2]
        assert len(found[seed][0]) == 3
    assert found[2] != found[3]


def test_orders_by_class_hold_within_a_part() -> None:
    label_N = np.arange(60) % 4
    chosen = np.arange(0, 60, 3)
    clusters = np.arange(60) // 30
    order = ClassBalanced((60,), labels=label_N, batch_size=8, per_class=2, clusters=lambda epoch: clusters)
    part = order.of_part(chosen, "x")
    batches = part.epoch(0, 0)[:16].reshape(2, 8)
    assert all((np.bincount(label_N[chosen][batch], minlength=4) % 2 == 0).all() for batch in batches)
    assert all(len(set(clusters[chosen][batch])) == 1 for batch in batches)
    groups = ClassGroups((60,), labels=label_N, batch_size=8, groups=GroupSizes((2,), (0,))).of_part(chosen, "x")
    pairs = label_N[chosen][groups.epoch(0, 0)[:16]].reshape(8, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrainingSubset(0), "size=0 and classes=None must be at least 1"),
        (lambda: TrainingSubset(5, seed=-1), "seed=-1 at least 0"),
        (lambda: TrainingSubset(5, classes=2, by_class=False), "classes=2 needs the classes"),
        (lambda: TrainingSubset(61).choose(Numbers()), "size=61 is more than the 60 training samples; lower it"),
        (lambda: TrainingSubset(5, classes=2).choose(Numbers()), "Numbers does not know the classes"),
        (lambda: TrainingSubset(5, by_class=True).choose(Numbers()), "by_class=true: Numbers does not know"),
        (lambda: subset_of(trainer_with(TrainingSubset(5), TrainingSubset(6))), "2 callbacks TrainingSubset"),
    ],
)
def test_what_cannot_be_a_part_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_too_many_classes_are_refused() -> None:
    data = prepared("digits", Path())
    data.trainer = trainer_with(TrainingSubset(16, classes=11))
    with pytest.raises(UserError, match="classes=11 is more than the 10"):
        data.train_dataloader()


def test_tasks_one_after_the_other_are_refused() -> None:
    data = ClassStream(Digits(), tasks=2, batch_size=8)
    data.setup()
    data.trainer = trainer_with(TrainingSubset(16))
    with pytest.raises(UserError, match="a part of tasks that come one after the other"):
        data.train_dataloader()


def test_data_of_another_loader_are_refused_when_training_starts() -> None:
    trainer = SimpleNamespace(train_dataloader=DataLoader([1, 2]), is_global_zero=True)
    with pytest.raises(UserError, match=r"a DataLoader loads them; return `train_loader\(...\)`"):
        TrainingSubset(1).on_train_start(trainer, None)  # type: ignore[arg-type]


def test_without_a_subset_nothing_changes() -> None:
    loader = train_loader(Numbers(), 8, 0, 0, trainer_with())
    assert loader.order == Order((60,))
    assert "content" not in loader.state_dict()
