"""`Method`: what its training figures cost ranks, and that they are means."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.core.errors import UserError
from lightspan.training.method import BetweenEpochs, Method

QUIET: dict[str, Any] = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Counts(Method):
    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.0))
        self.layer = nn.Linear(2, 2)

        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log_training({"train/step": torch.tensor(float(self.global_step)), "train/loss": loss}, prog_bar=True)
        return loss


class Keeps(Logger):
    """A logger in memory."""

    name, version = "keeps", 0

    def __init__(self) -> None:
        super().__init__()
        self.written: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.written += [metrics["train/step"]] if "train/step" in metrics else []

    def log_hyperparams(self, *args: object, **options: object) -> None:
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_exchange_training_figures_once_in_each_step_that_is_written(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[int] = []

    def pretend(tensors: list[Tensor]) -> None:
        exchanged.append(sum(tensor.numel() for tensor in tensors))
        tensors[0] += 100  # the mean with a rank far away

    monkeypatch.setattr("lightspan.training.method.world_size", lambda: 2)
    monkeypatch.setattr("lightspan.training.method.mean_over_ranks", pretend)
    logger = Keeps()
    trainer = Trainer(
        max_steps=6, accumulate_grad_batches=accumulate, log_every_n_steps=3, accelerator="cpu", logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Counts()
    trainer.fit(model, DataLoader(torch.zeros(6 * accumulate, 1, 2), batch_size=None))
    assert logger.written == [102.0, 105.0]
    assert exchanged == [2] * 2 * accumulate  # both figures in one collective
    # What other callbacks decide by is never one rank's own: nothing at first, then the mean of the last exchange.
    assert [seen.get("train/step") for seen in model.seen[accumulate - 1 :: accumulate]] == [
        None, None, 102.0, 102.0, 102.0, 105.0
    ]  # fmt: skip


def test_one_process_exchanges_nothing_and_logs_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightspan.training.method.mean_over_ranks", None)
    model, seen = Counts(), {}
    model.log_dict = lambda values, **options: seen.update(values, **options)  # type: ignore[method-assign]
    figures = {"train/loss": torch.ones(())}
    model.log_training(figures, prog_bar=True)
    assert seen == {**figures, "prog_bar": True}


def test_figures_keep_their_precision_when_they_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightspan.training.method.world_size", lambda: 2)
    monkeypatch.setattr("lightspan.training.method.mean_over_ranks", lambda tensors: None)
    monkeypatch.setattr(Method, "_writes_this_step", lambda self: True)
    model, seen = Counts(), {}
    model.log_dict = lambda values, **options: seen.update(values)  # type: ignore[method-assign]
    model.log_training({"a": torch.tensor(1 / 3, dtype=torch.float64), "b": torch.tensor(0.5).bfloat16()})
    assert seen == {"a": 1 / 3, "b": 0.5}


class Rows(LightningDataModule):
    def __init__(self, rows: list[Any]) -> None:
        super().__init__()
        self.rows, self.passed = rows, 0

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=len(self.rows))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.passed += 1
        return batch


class Sorts(Method):
    """Its training step would look the labels up."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.0))
        self.layer, self.steps = nn.Linear(2, 3), 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return nn.functional.cross_entropy(self.layer(batch["x"]), batch["label"])


@pytest.mark.parametrize(("label", "said"), [(3, "from 0 to 3"), (-1, "from -1 to 0")])
def test_labels_beyond_the_classes_are_refused_before_they_are_looked_up(label: int, said: str, tmp_path: Path) -> None:
    rows = [{"x": torch.zeros(2), "label": torch.tensor(value)} for value in (0, label)]
    module = Sorts()
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, **QUIET)
    with pytest.raises(UserError, match=rf"labels {said} do not fit Sorts of 3 classes; labels count from 0"):
        trainer.fit(module, datamodule=Rows(rows))
    assert module.steps == 0


def test_labels_below_the_number_of_classes_pass_and_data_modules_keep_their_hook(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data = Rows([{"x": torch.zeros(2), "label": torch.tensor(2)}])
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, **QUIET)
    trainer.fit(module := Sorts(), datamodule=data)
    assert (module.steps, data.passed) == (1, 1)
    assert not [one for one in recwarn if "on_before_batch_transfer" in str(one.message)]


def test_features_are_the_backbone_of_images_or_of_the_first_views() -> None:
    class Backed(Counts):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.layer

    image, view = torch.randn(2, 4, 2)
    method = Backed()
    assert torch.equal(method.features({"image": image, "views": [view]}), method.layer(image))
    assert torch.equal(method.features({"views": [view, image]}), method.layer(view))


@pytest.mark.parametrize("batch", [{"label": torch.ones(4)}, {"views": []}, torch.ones(4, 2)])
def test_a_method_without_backbone_or_a_batch_without_anything_to_read_has_no_features(batch: Any) -> None:
    method = Counts()
    for _ in range(2):
        with pytest.raises(UserError, match=r"Counts defines no features\(batch\), which probes need; add it"):
            method.features(batch)
        method.backbone = method.layer
    del method.backbone
    with pytest.raises(UserError, match="Counts defines no features"):
        method.features({"image": torch.ones(4, 2)})


def test_embeddings_are_the_features_through_the_projector_if_there_is_one() -> None:
    class Features(Counts):
        def features(self, batch: Tensor) -> Tensor:
            return self.layer(batch)

    class Projected(Features):
        def __init__(self) -> None:
            super().__init__()
            self.projector = nn.Linear(2, 3)

    batch, plain, projected = torch.ones(4, 2), Features(), Projected()
    assert torch.equal(plain.embeddings(batch), plain.layer(batch))
    assert torch.equal(projected.embeddings(batch), projected.projector(projected.layer(batch)))


def test_weights_of_other_widths_or_parts_are_refused_in_one_sentence_that_names_them(tmp_path: Path) -> None:
    small, large = Sorts(), Sorts()
    large.layer = nn.Linear(2, 7)
    with pytest.raises(UserError, match=r"of another Sorts than this one: size mismatch for layer.weight.*resolved"):
        large.load_state_dict(small.state_dict())
    extra = {**small.state_dict(), **{f"part{i}": torch.zeros(1) for i in range(2)}}
    with pytest.raises(UserError, match=r'Unexpected key\(s\) in state_dict: "part0", "part1"; build it') as raised:
        small.load_state_dict(extra)
    assert "\n" not in str(raised.value)
    assert small.load_state_dict(extra, strict=False).unexpected_keys == ["part0", "part1"]


class Enters(BetweenEpochs):
    def __init__(self) -> None:
        super().__init__(optimizer=partial(torch.optim.SGD, lr=0.0))
        self.layer, self.entered = nn.Linear(2, 2), list[tuple[int, bool]]()

    def enter(self, epoch: int) -> None:
        self.entered.append((epoch, torch.is_grad_enabled()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.entered[-1][0] == self.current_epoch
        return self.layer(batch).square().mean()


def test_each_epoch_is_entered_once_before_its_first_batch_or_earlier_if_asked(tmp_path: Path) -> None:
    data = DataLoader([torch.ones(3, 2)] * 2, batch_size=None)  # type: ignore[arg-type]
    first, second = Enters(), Enters()
    first.begin(0)  # as a loader does, before the epoch
    trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, logger=False, **QUIET)
    trainer.fit(first, data)
    assert first.entered == [(0, False), (1, False)]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    longer = Trainer(max_epochs=4, accelerator="cpu", default_root_dir=tmp_path, logger=False, **QUIET)
    longer.fit(second, data, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert second.entered == [(2, False), (3, False)]
    assert int(second.begun) == 3
    within = Enters()  # resumed within an epoch, which its buffer tells
    within.begun.fill_(1)
    within.begin(1)
    assert within.entered == []


class Remembers(Method):
    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.0))
        self.layer, self.num_images = nn.Linear(2, 2), 4

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch["x"]).square().mean()


@pytest.mark.parametrize(("index", "fits"), [([0, 3], True), ([3, 4], False), ([-1, 0], False)])
def test_images_without_a_place_are_refused_before_their_batch_goes_to_the_device(
    index: list[int], fits: bool, tmp_path: Path
) -> None:
    batch = {"x": torch.ones(2, 2), "index": torch.tensor(index)}
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, **QUIET)
    data: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    if fits:
        trainer.fit(Remembers(), data)
    else:
        with pytest.raises(UserError, match=r"Remembers's memory has places for \[0, images=4\)"):
            trainer.fit(Remembers(), data)


def test_data_with_more_images_than_places_are_refused(tmp_path: Path) -> None:
    class Five(LightningDataModule):
        train = range(5)

        def train_dataloader(self) -> Any:
            return DataLoader([{"x": torch.ones(2, 2)}], batch_size=None)  # type: ignore[arg-type]

    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, **QUIET)
    with pytest.raises(UserError, match="the data have 5 training images, and Remembers's memory holds images=4"):
        trainer.fit(Remembers(), Five())


class Labelled(LightningDataModule):
    """What a folder has found: labels or none."""

    def __init__(self, labelled: bool) -> None:
        super().__init__()
        self.labelled = labelled

    def train_dataloader(self) -> DataLoader:
        return DataLoader([torch.ones(2)])


@pytest.mark.parametrize("reads", [{"num_classes": 3}, {"learns_from_labels": True}])
def test_data_that_found_no_labels_train_no_method_that_learns_from_them(reads: dict[str, Any]) -> None:
    method = Counts()
    for name, value in reads.items():
        setattr(method, name, value)
    trainer = partial(Trainer, accelerator="cpu", max_steps=1, logger=False, **QUIET)
    with pytest.raises(UserError, match="Counts reads the label of each sample, and Labelled has found none; put the"):
        trainer().fit(method, datamodule=Labelled(False))
    trainer().fit(method, datamodule=Labelled(True))
    trainer().fit(Counts(), datamodule=Labelled(False))
