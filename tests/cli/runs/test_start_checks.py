"""What is reported before the first step, and not in mid-run: schedules that end early, data without a place."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader

from lightspan.cli.runs.start_checks import StartChecks, exhausted_schedule, silence_frozen
from lightspan.cli.runs.train import call
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.ranks import train_loader
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.frozen import Frozen
from lightspan.optim.schedules import WarmupCosine


class OneCycle(LightningModule):
    """8 batches an epoch under a OneCycleLR of `length` steps; `steps` counts those that were taken."""

    def __init__(self, length: int, interval: str = "step", chained: bool = False, frequency: int = 1) -> None:
        super().__init__()
        self.layer, self.length, self.interval = nn.Linear(4, 1), length, interval
        self.chained, self.frequency, self.steps = chained, frequency, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule: Any = OneCycleLR(optimizer, max_lr=0.1, total_steps=self.length)
        if self.chained:
            schedule = ChainedScheduler([ConstantLR(optimizer), schedule])
        return [optimizer], [{"scheduler": schedule, "interval": self.interval, "frequency": self.frequency}]


def fit(
    tmp_path: Path,
    module: LightningModule,
    *callbacks: Any,
    data: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=[StartChecks(), *callbacks],
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **quiet | options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module, data if data is not None else DataLoader(torch.ones(8, 4)), ckpt_path=ckpt_path, weights_only=True
        )


@pytest.mark.parametrize(
    ("module", "options", "last"),
    [
        (OneCycle(15), {"max_epochs": 2}, 16),
        (OneCycle(9), {"max_epochs": 5, "max_steps": 10}, 10),
        (OneCycle(15, chained=True), {"max_epochs": 2}, 16),
        (OneCycle(7), {"max_epochs": 2, "accumulate_grad_batches": 2}, 8),
        (OneCycle(2, "epoch"), {"max_epochs": 3}, 3),
    ],
    ids=["epochs", "steps", "chained", "accumulated", "by epochs"],
)
def test_a_schedule_that_ends_before_the_run_is_refused_before_the_first_step(tmp_path, module, options, last):
    said = rf"OneCycleLR has total_steps={module.length}, but this run takes it to step {last}; .*estimated_stepping"
    with pytest.raises(UserError, match=said):
        fit(tmp_path, module, **options)
    assert module.steps == 0


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (OneCycle(16), {"max_epochs": 2}),
        (OneCycle(8), {"max_epochs": 2, "accumulate_grad_batches": 2}),
        (OneCycle(3, "epoch"), {"max_epochs": 3}),
        (OneCycle(8, frequency=2), {"max_epochs": 2}),
    ],
    ids=["by steps", "accumulated", "by epochs", "every other step"],
)
def test_a_schedule_that_is_just_long_enough_runs(tmp_path, module, options):
    fit(tmp_path, module, **options)
    assert module.steps == 8 * options["max_epochs"]


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("loss", stopping_threshold=1e9, check_on_train_epoch_end=True),
        GradientAccumulationScheduler({0: 2, 1: 4}),
    ],
    ids=["early stopping", "changing accumulation"],
)
def test_where_the_length_of_the_run_is_not_known_it_runs(tmp_path, callback):
    module = OneCycle(16)
    fit(tmp_path, module, callback, max_epochs=3 if isinstance(callback, GradientAccumulationScheduler) else 9)
    assert module.steps >= 8


def test_an_end_that_comes_in_mid_run_is_said_in_the_same_words(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=2)

    def steps() -> None:
        for _ in range(3):
            optimizer.step()
            schedule.step()

    built: Any = SimpleNamespace(trainer=SimpleNamespace(interrupted=False, global_step=2))
    with pytest.raises(UserError, match=r"OneCycleLR has total_steps=2, but it came to step 3; beyond its end"):
        call(steps, built, tmp_path, None)
    assert exhausted_schedule(ValueError("another")) is None


class Cosine(LightningModule):
    """Under a schedule of `length` steps, or of as many as the run has."""

    def __init__(self, length: int | None = None, kind: Any = WarmupCosine) -> None:
        super().__init__()
        self.layer, self.length, self.kind = nn.Linear(4, 1), length, kind

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = self.kind(optimizer, self.length or int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_a_resumed_run_that_outlasts_its_schedule_says_so_once_with_both_steps(tmp_path, capsys):
    last = tmp_path / "last.ckpt"
    fit(tmp_path, Cosine(), ModelCheckpoint(tmp_path, "last"), max_steps=3, enable_checkpointing=True)
    assert "ends at step" not in capsys.readouterr().err
    fit(tmp_path, Cosine(), max_steps=6, ckpt_path=last)
    said = capsys.readouterr().err
    assert said.count("the schedule WarmupCosine ends at step 3, and this run has steps up to 6 (it is resumed") == 1
    assert "start one of 6 steps in another folder" in said
    fit(tmp_path, Cosine(), max_steps=3, ckpt_path=last)
    assert "ends at step" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [WarmupCosine, CosineAnnealingLR])
def test_a_schedule_of_fewer_steps_than_a_new_run_is_said_and_one_of_as_many_is_not(tmp_path, capsys, kind):
    fit(tmp_path, Cosine(2, kind), max_steps=3)
    said = capsys.readouterr().err
    assert f"the schedule {kind.__name__} ends at step 2, and this run has steps up to 3: after its end" in said
    fit(tmp_path, Cosine(3, kind), max_steps=3)
    assert "ends at step" not in capsys.readouterr().err


class _Rows:
    def __len__(self) -> int:
        return 8

    def sample(self, index: int, seed: int) -> Tensor:
        return torch.ones(4)


@pytest.mark.parametrize("plain", [True, False])
def test_a_loader_that_keeps_no_position_is_named_once(tmp_path, capsys, plain):
    loader = DataLoader(torch.ones(8, 4), shuffle=True) if plain else train_loader(_Rows(), 1, 0, 0, None)
    fit(tmp_path, OneCycle(16), data=loader, max_epochs=2)
    said = capsys.readouterr().err
    assert said.count("note: the training data come from a DataLoader, which keeps no position") == plain
    assert said.count("lightspan.datamodules.loading.ranks.train_loader") == plain


class Validated(OneCycle):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps += 100


@pytest.mark.parametrize(
    ("options", "ends", "due"),
    [
        ({"max_steps": 3}, 3, "after 8 batches"),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 6, "after 8 batches"),
        ({"max_epochs": 1, "check_val_every_n_epoch": 2}, 8, "after 16 batches"),
        ({"max_steps": 9, "check_val_every_n_epoch": 2}, 9, "after 16 batches"),
        ({"max_steps": 3, "val_check_interval": 4}, 3, "after 4 batches"),
        ({"max_steps": 3, "val_check_interval": 20, "check_val_every_n_epoch": None}, 3, "after 20 batches"),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(tmp_path, capsys, options, ends, due):
    module = Validated(100)
    fit(tmp_path, module, data=loaders(), num_sanity_val_steps=0, **options)
    assert module.steps < 100
    said = f"this run is never validated: it ends after {ends} batches, and the first validation is due {due}; set "
    often = options.get("check_val_every_n_epoch") != 2
    way_out = f"trainer.val_check_interval={ends} or lower" if often else "trainer.check_val_every_n_epoch=1"
    assert said + way_out in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 8},
        {"max_epochs": 1},
        {"max_steps": 4, "accumulate_grad_batches": 2},
        {"max_steps": 3, "accumulate_grad_batches": 3},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
        {"max_steps": 3, "val_check_interval": 3},
        {"max_steps": 9, "val_check_interval": 9, "check_val_every_n_epoch": None},
    ],
)
def test_a_run_that_is_validated_says_nothing_and_neither_does_one_that_shall_not_be(tmp_path, capsys, options):
    module = Validated(100)
    fit(tmp_path, module, data=loaders(), num_sanity_val_steps=0, **options)
    assert module.steps > 100
    fit(tmp_path, OneCycle(100), data=loaders(), max_steps=3)
    fit(tmp_path, Validated(100), data=loaders(), max_steps=3, limit_val_batches=0)
    assert "never validated" not in capsys.readouterr().err


def test_a_run_without_validation_data_says_nothing_of_it(tmp_path, capsys):
    class TrainingAlone(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(8, 4))

        def val_dataloader(self) -> Any:
            return []

    fit(tmp_path, Validated(100), data=TrainingAlone(), max_steps=3)
    assert "never validated" not in capsys.readouterr().err


def loaders() -> Any:
    class Both(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(8, 4))

        val_dataloader = train_dataloader

    return Both()


@pytest.mark.parametrize(("more", "said"), [(0, 0), (1, 1)])
def test_a_teacher_in_evaluation_mode_is_no_news_but_other_modules_are(tmp_path: Path, more: int, said: int) -> None:
    module = OneCycle(8)
    module.teacher = Frozen(nn.Linear(4, 1))
    module.follower = EMATeacher(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), batch_statistics=True)
    module.others = nn.ModuleList(nn.Linear(4, 1).eval() for _ in range(more))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_frozen(module)
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, DataLoader(torch.ones(8, 4)))
    assert sum("in eval mode" in str(one.message) for one in caught) == said
