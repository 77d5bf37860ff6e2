"""Views made on the device: the same batches as from the workers, in every precision, for anybody's module."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from lightning import LightningDataModule, LightningModule, Trainer
from shard_files import write_shards
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.fields import ImageFields, Place
from lightspan.datamodules.image.augment.rendering import Drawn
from lightspan.datamodules.image.augment.views import MultiCrop, NestedCrops, RandomViews, Repeated, TwoViews, Views
from lightspan.datamodules.image.batch import ViewParameters
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.shards.stream import Shards

CROPS = MultiCrop([RandomViews(size=6, scale=(0.3, 0.9), blur=0.5), RandomViews(count=1, size=3, flip=0.0)])


class Keep(LightningModule):
    """Keeps the batches that it is given, and trains nothing to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch["label"].sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert "image" in batch
        assert batch["image"].is_floating_point()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Marks(Keep):
    """Has the hook that a data module could take away from it."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "mark": len(batch["views"]) if "views" in batch else 0}


def fitted(data: LightningDataModule, module: Keep, **settings: Any) -> list[dict[str, Any]]:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=2, num_sanity_val_steps=1, **quiet, **settings)
    trainer.fit(module, datamodule=data)
    return module.batches


def digits(place: Place, views: Views = CROPS) -> Digits:
    return Digits(8, views, train_size=40, views_on=place)


def shards(place: Place, folder: Path) -> Shards:
    return Shards(write_shards(folder, [9]), batch_size=4, views=CROPS, views_on=place)


@pytest.mark.parametrize("make", [lambda place, _: digits(place), shards], ids=["images", "shards"])
def test_batches_are_those_of_the_workers(make: Callable[[Place, Path], LightningDataModule], tmp_path: Path) -> None:
    of_workers, of_device = (fitted(make(place, tmp_path), Keep()) for place in ("workers", "device"))
    assert len(of_workers) == 2
    for ours, theirs in zip(of_device, of_workers, strict=True):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours["parameters"], theirs["parameters"])
        assert [view.shape[2:] for view in ours["views"]] == [(6, 6), (6, 6), (3, 3)]


def test_low_precision_is_that_of_the_views_and_not_of_their_numbers() -> None:
    whole, low = (fitted(digits("device"), Keep(), precision=kind)[0] for kind in ("32-true", "bf16-true"))
    for view, exact in zip(low["views"], whole["views"], strict=True):
        assert view.dtype == torch.bfloat16
        assert torch.equal(view, exact.bfloat16())


@pytest.mark.parametrize("place", ["workers", "device"])
def test_a_module_keeps_its_own_hook(place: Place) -> None:
    assert [batch["mark"] for batch in fitted(digits(place), Marks())] == [3, 3]


def test_parameters_name_the_crop_that_was_taken() -> None:
    """A ramp of brightness tells where its crop was."""
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64).clone()
    nested = NestedCrops(RandomViews(count=1, flip=0.0, jitter=0.0), RandomViews(count=3, flip=0.0, jitter=0.0))
    sample = ImageFields(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), nested)(ramp, seed=7)
    p = ViewParameters(*sample["parameters"].unbind(-1))
    for view, left, width in zip(sample["views"], p.left * 64, p.width * 64, strict=True):
        middle = (left + (width - 1) / 2) / 63
        torch.testing.assert_close(view.mean(), middle, atol=2e-3, rtol=0)


def test_views_of_ones_own_come_without_parameters_and_from_the_workers_alone() -> None:
    class Own(Views):
        def __call__(self, image: Tensor) -> list[Tensor]:
            return [image.float() / 255, image.float() / 510]

    for views, count in ((Own(), 2), (MultiCrop([Own(), TwoViews()]), 4)):
        data = digits("workers", views)
        data.setup()
        batch = next(iter(data.train_dataloader()))
        assert batch.keys() == {"views", "label", "index"}
        assert len(batch["views"]) == count
    with pytest.raises(UserError, match="views_on=device with Own, made one image at a time; set"):
        digits("device", Own()).setup()
    with pytest.raises(UserError, match="views_on=device with MultiCrop, made one image at a time; set"):
        digits("device", MultiCrop([TwoViews(), Own()])).setup()
    with pytest.raises(UserError, match="views_on=device with no views; set"):
        Shards(["x.tar"], views_on="device")


class Inverted(TwoViews):
    """Changes the finished views, as a first subclass does."""

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [1 - view for view in super().__call__(image)]


class Darkened(RandomViews):
    def render(self, image: Tensor, drawn: list[Drawn]) -> list[Tensor]:
        return [view / 2 for view in super().render(image, drawn)]


@pytest.mark.parametrize(
    ("own", "plain", "change"),
    [
        (Inverted(), TwoViews(), lambda view: 1 - view),
        (Darkened(), RandomViews(), lambda view: view / 2),
        (MultiCrop([TwoViews(), Darkened()]), MultiCrop([TwoViews(), RandomViews()]), None),
    ],
    ids=["__call__", "render", "a part"],
)
def test_what_a_subclass_makes_of_drawn_views_is_what_trains(own: Views, plain: Views, change: Any) -> None:
    fields = (ImageFields(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), views) for views in (own, plain))
    ours, theirs = (one(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)), seed=5) for one in fields)
    changed = theirs["views"][:2] + [view / 2 for view in theirs["views"][2:]] if change is None else None
    for view, expected in zip(ours["views"], changed or map(change, theirs["views"]), strict=True):
        assert torch.equal(view, expected)
    with pytest.raises(UserError, match=f"views_on=device with {type(own).__name__}, made one image at a time; set"):
        digits("device", own).setup()


def test_views_that_draw_anew_refuse_a_subclass_whose_own_part_they_would_leave_out() -> None:
    for make in (lambda: Repeated(Inverted()), lambda: NestedCrops(RandomViews(count=1), Darkened())):
        with pytest.raises(UserError, match=r"from drawn numbers, but \w+ has a __call__ or render of its own"):
            make()


def test_nothing_waits_for_the_device_and_a_plan_can_pass_shapes_through() -> None:
    data = digits("device")
    data.setup()
    batch = next(iter(data.train_dataloader()))
    with HostReads() as reads:
        real = data.on_after_batch_transfer(batch, 0)
    assert reads.count == 0
    with FakeTensorMode() as mode:
        fake = data.on_after_batch_transfer({name: mode.from_tensor(value) for name, value in batch.items()}, 0)
    assert [view.shape for view in fake["views"]] == [view.shape for view in real["views"]]


def test_a_data_module_with_views_on_the_device_can_be_sent_to_another_process() -> None:
    data = digits("device", TwoViews())
    data.setup()
    batch = next(iter(data.train_dataloader()))
    again = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(again.on_after_batch_transfer(batch, 0), data.on_after_batch_transfer(batch, 0))
