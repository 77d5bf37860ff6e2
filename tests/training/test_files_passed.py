"""How far a training step leads through the files of this project, its batch included."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from passed_files import files_passed

from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import inside_run, resolve
from lightspan.core import errors

ROOT = Path(errors.__file__).parents[2]
QUIET = ("trainer.callbacks.collapse=null", "trainer.callbacks.probes=null", "data.init_args.train_size=256")


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
            self.open = files_passed(ROOT)
            self.passed = self.open.__enter__()


@pytest.mark.runs
def test_a_step_of_dino_passes_few_files(tmp_path: Path) -> None:
    """Callbacks and loggers aside, which look on and can be left out of the recipe."""
    built = build(inside_run(resolve("distillation/dino", (), ("trainer.max_steps=3", *QUIET), ())), tmp_path)
    built.trainer.callbacks.append(following := Following())  # type: ignore[attr-defined]
    built.trainer.fit(built.model, datamodule=built.datamodule)
    step = {file for file in following.passed if file.startswith(("framework/", "datamodules/"))}
    step -= {file for file in step if "/loggers/" in file}
    assert {"framework/methods/distillation/dino", "datamodules/loading/loader"} <= step
    assert len(step) <= 32, sorted(step)
