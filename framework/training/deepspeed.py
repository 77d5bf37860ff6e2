"""DeepSpeed's ZeRO under Lightning, with checkpoints that are whole or absent and run no code when they are read.

ZeRO concatenates parameters and gives each rank one range of the numbers, so an optimiser sees vectors instead of
matrices. This changes nothing for AdamW and others that treat each number by itself; what needs rows and columns
is refused.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.optim import Optimizer

from lightspan.core.errors import UserError, first_lines
from lightspan.core.files.atomic import explained_os_errors, replace_folder, temporary_path
from lightspan.training.checkpoints.io import refuse_torn
from lightspan.training.checkpoints.manifest import header, packed_fault, seal_folder
from lightspan.training.checkpoints.shards import explained_reading
from lightspan.training.strategies import ExactMeans
from lightspan.training.wiring.optimizers import refuse_flat_partitions

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class ZeRO(ExactMeans, DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy, with its arguments; `stage` says what the ranks divide up: 1 optimiser state,
    2 gradients too, 3 weights too.

    A checkpoint is a folder: written under a temporary name, sealed with a manifest, and renamed when all ranks are
    done. It resumes on as many ranks as wrote it. Its files are read with `weights_only=True` and the few classes of
    DeepSpeed that they contain.

    Raises: UserError before the first step for an optimiser that needs matrices.
    """

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        optimizer, scheduler = super()._init_optimizers()
        refuse_flat_partitions(self, [type(optimizer)])
        return optimizer, scheduler

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: Any | None = None) -> None:
        """Raises: UserError, on every rank, if the folder cannot be written; what was there before is kept."""
        path = Path(self.broadcast(str(filepath)))
        temporary = temporary_path(path, "ranks")  # the same on every rank
        self._on_first_rank(path, partial(shutil.rmtree, temporary, ignore_errors=True))  # of a killed run
        with explained_os_errors(path):
            super().save_checkpoint(checkpoint, temporary, storage_options)
        self.barrier()
        self._on_first_rank(path, partial(_publish, header(checkpoint), temporary, path))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises: UserError for a folder that is torn, or contains more than tensors, plain values and DeepSpeed's own
        records.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        self._on_first_rank(path, partial(refuse_torn, path))
        engine = self.deepspeed_engine.checkpoint_engine
        engine.load = partial(_load, path)
        try:
            with explained_reading(path), _weights_only():
                return super().load_checkpoint(path, weights_only=True)
        finally:
            del engine.load

    def _on_first_rank(self, path: Path, function: Callable[[], Any]) -> None:
        verdict = None
        if self.is_global_zero:
            try:
                with explained_os_errors(path):
                    function()
            except UserError as error:
                verdict = str(error)
        if verdict := self.broadcast(verdict):
            raise UserError(verdict)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Inside, torch unpickles nothing freely, whatever it is asked to: DeepSpeed reads some files, such as those of a
    universal checkpoint, which settings ask for, past its checkpoint engine.
    """
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def _publish(head: dict[str, Any], temporary: Path, path: Path) -> None:
    seal_folder(temporary, head)
    replace_folder(temporary, path)


def _load(checkpoint: Path, path: str, map_location: Any = None) -> Any:
    """In place of DeepSpeed's own `torch.load(weights_only=False)`, which runs what a file tells it to."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with Path(path).open("rb") as file:
            if packed := packed_fault(file):
                raise UserError(f"checkpoint {checkpoint}: {Path(path).name} {packed}; resume from another checkpoint")
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"checkpoint {checkpoint}: {Path(path).name} contains more than tensors, plain values and DeepSpeed's own "
            "records, so it was not loaded and no code in it was run; resume from another checkpoint"
        ) from error
    except UserError:
        raise
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: {Path(path).name} is damaged ({first_lines(error)}); resume from "
            "another checkpoint"
        ) from error
