"""How far a training step leads through the files of this project, its batch included."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from passed_files import files_passed

from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import inside_run, resolve

OF_DINO = 25


class Following(Callback):
    """From the end of the second step to the end of the third."""

    def __init__(self) -> None:
        self.open: Any = None
        self.passed = set[str]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None
        elif trainer.global_step == 2:
            self.open = files_passed()
            self.passed = self.open.__enter__()


@pytest.mark.runs
def test_a_step_of_dino_passes_few_files(tmp_path: Path) -> None:
    """Callbacks and loggers aside, which look on and can be left out of the recipe."""
    recipe = resolve("distillation/dino", (), ("trainer.max_steps=3", "data.init_args.train_size=256"), ())
    built = build(inside_run(recipe), tmp_path)
    built.trainer.callbacks[:] = [following := Following()]  # type: ignore[attr-defined]
    built.trainer.loggers = []
    built.trainer.fit(built.model, datamodule=built.datamodule)
    step = following.passed
    assert {"framework/methods/distillation/dino", "datamodules/loading/loader"} <= step
    assert len(step) <= OF_DINO, sorted(step)
