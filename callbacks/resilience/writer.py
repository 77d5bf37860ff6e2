"""How the checkpoints of a callback get to disk: whole, in the order asked for, each state written once."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightspan.callbacks.resilience.stamp import KEY, run_ids
from lightspan.callbacks.resilience.uploads import Uploads
from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import link_atomic
from lightspan.core.files.places import PathUse
from lightspan.training.checkpoints.background import Background
from lightspan.training.checkpoints.copies import try_out
from lightspan.training.checkpoints.folder import FolderCheckpoints, error_message
from lightspan.training.checkpoints.io import WholeFileCheckpointIO, outline, refuse_torn, use_whole_files
from lightspan.training.checkpoints.manifest import COMPLETE, header, newest_whole, seal_folder, set_latest


class Writer:
    """Writes at once, or in a thread while training goes on.

    Args:
        folder: of the checkpoints.
        in_background: whether to write in a thread, behind what was asked for before.
        copies: where each checkpoint is copied to, too.
    """

    def __init__(
        self,
        folder: Annotated[Path, PathUse.RUN],
        in_background: bool,
        copies: Annotated[str, PathUse.SERVER] | None = None,
    ) -> None:
        self.folder, self._copies = folder, copies
        self._uploads: Uploads | None = None  # on the first rank
        self._background = Background() if in_background else None
        self._folders: FolderCheckpoints | None = None
        self._submitted_step: int | None = None
        self._just_written: str | None = None

    def use_whole_files(self, trainer: Trainer, check: Callable[[dict[str, Any], Path], None]) -> None:
        """From now on the strategy writes and reads checkpoints as this project does.

        Args:
            check: refuses the checkpoint of a sharded model, whose folder is read part by part.

        Raises: UserError, on every rank, for copies of what a strategy writes by itself, and to where nothing can be
        written.
        """
        strategy = trainer.strategy
        use_whole_files(strategy, self._background)
        if isinstance(strategy, ModelParallelStrategy):
            self._folders = FolderCheckpoints(strategy, self._background, check, refuse_torn, outline)
            if strategy._save_distributed_checkpoint:
                setattr(strategy, "save_checkpoint", self._folders.save)  # noqa: B010
            setattr(strategy, "load_checkpoint", self._folders.load)  # noqa: B010
        if self._copies is None:
            return
        if not self._writes_all(strategy):
            raise UserError(
                f"copies={self._copies}: {type(strategy).__name__} writes checkpoints by itself and in place, so none "
                "can be copied while training continues; leave copies out"
            )
        verdict = error_message(partial(try_out, self._copies)) if trainer.is_global_zero else None
        if verdict := strategy.broadcast(verdict):
            raise UserError(f"copies: {verdict}")
        if trainer.is_global_zero:
            self._uploads = Uploads(self._copies)

    def new_moment(self) -> None:
        """What was written before may no longer be the state of the run."""
        self._just_written = None

    def save(self, trainer: Trainer, filepath: str, write: Callable[[], None]) -> bool:
        """Calls `write`, which writes `filepath`, unless this same state was written in this moment: then the second
        name costs a link. Returns whether it was one. Every rank must call it.

        Raises: UserError that names the last whole checkpoint where this one cannot be written.
        """
        with self._naming_the_last_whole():
            if self._submitted_step != trainer.global_step:
                self._wait()
            linked = self._just_written is not None
            if self._just_written is not None:
                self._link(trainer, Path(self._just_written), Path(filepath))
            else:
                self._write(trainer, filepath, write)
            self._submitted_step = trainer.global_step
            if trainer.is_global_zero:
                self.afterwards(filepath, set_latest)
            if self._uploads is not None and not linked:
                self.afterwards(filepath, partial(self._uploads.add, step=trainer.global_step))
        return linked

    def afterwards(self, filepath: str, job: Callable[[Path], None]) -> None:
        """Does a job that needs all earlier checkpoints to be whole: at once, or behind them in the background."""
        if self._background is None:
            job(Path(filepath))
        else:
            self._background.submit(Path(filepath), partial(job, Path(filepath)))

    def finish(self) -> None:
        """Returns when all is written. Raises: UserError that names the last whole checkpoint where it is not."""
        with self._naming_the_last_whole():
            self._wait()

    def close(self) -> None:
        if self._background is not None:
            self._background.close()
        if self._uploads is not None:
            self._uploads.close()
        if self._folders is not None:
            self._folders.close()

    def _write(self, trainer: Trainer, filepath: str, write: Callable[[], None]) -> None:
        seals = trainer.is_global_zero and _writes_folders(trainer.strategy)
        if seals and Path(filepath).is_dir():
            (Path(filepath) / COMPLETE).unlink(missing_ok=True)
        write()
        if seals:
            stamp = {"loggers": run_ids(trainer), "random_states": [None] * world_size()}
            seal_folder(Path(filepath), header({"global_step": trainer.global_step, KEY: stamp}))
        self._just_written = filepath if self._writes_all(trainer.strategy) else None

    def _writes_all(self, strategy: Strategy) -> bool:
        """Whether nobody else writes: what a strategy writes by itself it may change in place, under both names."""
        by_itself = type(strategy).save_checkpoint is not Strategy.save_checkpoint and self._folders is None
        return isinstance(strategy.checkpoint_io, WholeFileCheckpointIO) and not by_itself

    def _link(self, trainer: Trainer, written: Path, path: Path) -> None:
        verdict, job = None, partial(link_atomic, written, path)
        if trainer.is_global_zero and self._background is not None:
            self._background.submit(path, job)
        elif trainer.is_global_zero:
            verdict = error_message(job)
        if verdict := trainer.strategy.broadcast(verdict):
            raise UserError(verdict)

    def _wait(self) -> None:
        if self._background is not None:
            self._background.wait()

    @contextlib.contextmanager
    def _naming_the_last_whole(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            whole, _ = newest_whole(self.folder, contents=False)
            kept = f"the last whole checkpoint is {whole}" if whole else "there is no checkpoint yet"
            raise UserError(f"{error}; {kept}") from error


def _writes_folders(strategy: Strategy) -> bool:
    """Whether the strategy writes a folder in place by itself: not atomic, but with a marker known when torn."""
    return type(strategy) is DeepSpeedStrategy or (
        isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded"
    )
