"""Reading and writing single-file checkpoints: whole or not at all, and without unpickling anything else."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import Strategy

from lightspan import __version__
from lightspan.core.distributed import rank
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path, remove, require_regular_file
from lightspan.training.checkpoints.background import Background, staged
from lightspan.training.checkpoints.bytes import torch_save
from lightspan.training.checkpoints.content import content_fault, expanded
from lightspan.training.checkpoints.folder import error_message, read_folder, read_outline
from lightspan.training.checkpoints.manifest import (
    COMPLETE,
    FORMAT,
    checkpoints,
    fault_at_use,
    header,
    seal_file,
)
from lightspan.training.checkpoints.readable import readable
from lightspan.training.checkpoints.shards import METADATA, cause_of


class WholeFileCheckpointIO(CheckpointIO):
    """One local file per checkpoint: saved via a temporary name with its manifest inside, loaded if that matches.

    Loading always uses `weights_only=True`. A folder that several ranks wrote together is read too, completely,
    so that a sharded run can be inspected or continued without sharding. `loaded_stamp` is what lightspan
    wrote about itself into the last loaded checkpoint (version, format, classes).

    Args:
        background: writes there and returns once the tensors are copied.
        broadcast: gives every rank what the first one has; the first one then chooses and verifies for all.
    """

    def __init__(self, background: Background | None = None, broadcast: Callable[[Any], Any] = lambda it: it) -> None:
        self.loaded_stamp: dict[str, Any] = {}
        self._background, self._broadcast = background, broadcast

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises: UserError for what could not be read back, and if the file cannot be written; what was at `path`
        is then unchanged.
        """
        if storage_options is not None:
            raise UserError(
                f"storage_options={storage_options!r}: checkpoints go to local files, which have none; omit it"
            )
        checkpoint = readable(checkpoint)
        if self._background is None:
            _write(checkpoint, Path(path))
        else:
            self._background.submit(Path(path), partial(_write, staged(checkpoint), Path(path)))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises: UserError, the same on every rank, if the checkpoint is missing, torn, foreign, of a newer format,
        or has content that no checkpoint has.
        """
        if weights_only is False:
            raise UserError(
                f"weights_only=False for checkpoint {path}: loading could run code hidden in the file; "
                "leave weights_only unset and keep only tensors and plain values in checkpoints"
            )
        path = chosen(Path(path), self._broadcast)
        checkpoint = contents(path, map_location)
        self.loaded_stamp = checkpoint.get("lightspan", {})
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def use_whole_files(strategy: Strategy, background: Background | None = None) -> None:
    """From now on a strategy that writes single files reads and writes them as `WholeFileCheckpointIO` does."""
    if type(strategy.checkpoint_io) in (TorchCheckpointIO, WholeFileCheckpointIO):
        strategy.checkpoint_io = WholeFileCheckpointIO(background, strategy.broadcast)


def chosen(path: Path, broadcast: Callable[[Any], Any]) -> Path:
    """The first rank's checkpoint, which only that rank has verified. Raises: UserError on every rank."""
    path, verdict = broadcast((path, error_message(partial(refuse_torn, path))) if rank() == 0 else (path, None))
    if verdict:
        raise UserError(verdict)
    return path


def read_checkpoint(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint, file or folder, in CPU memory, verified and of the form that every checkpoint has.

    Args:
        optimizers: also read a folder's optimiser states.
    Raises: UserError as `WholeFileCheckpointIO.load_checkpoint`.
    """
    refuse_torn(path)
    return contents(path, optimizers=optimizers)


def contents(path: Path, map_location: Any = "cpu", optimizers: bool = True) -> dict[str, Any]:
    """The content of a checkpoint that is known to be whole. Raises: UserError for content that no checkpoint has."""
    checkpoint = read_folder(path, optimizers) if path.is_dir() else _read(path, map_location)
    return _of_known_form(checkpoint, path)


def unusable(path: Path) -> str | None:
    """What is wrong inside a whole checkpoint, without reading its tensors; None if it can be loaded.

    Folders of DeepSpeed, which have no list of shards, are not inspected.
    """
    if path.is_dir() and not (path / METADATA).exists():
        return None
    found = error_message(partial(outline, path))
    return found and found.removeprefix(f"checkpoint {path} ").removesuffix(f"; {_others(path)}")


def outline(path: Path) -> dict[str, Any]:
    """A whole checkpoint without its numbers: tensors of a file stay on disk, those of a folder are only shapes.

    Raises: UserError for content that no checkpoint has.
    """
    checkpoint = read_outline(path) if path.is_dir() else _read(path, "cpu", mmap=True)
    return _of_known_form(checkpoint, path)


def refuse_torn(path: Path) -> None:
    """Raises: UserError if the checkpoint at `path` is missing or not whole, with what could be loaded instead."""
    if not os.path.lexists(path):
        raise UserError(f"checkpoint {path} does not exist; {_others(path)}")
    if found := fault_at_use(path):
        raise UserError(f"checkpoint {path} {found.text}; {_others(path)}")


def refuse_newer(checkpoint: Any, path: Path) -> None:
    """Raises: UserError if a checkpoint has a format that this code does not know."""
    stamp = checkpoint.get("lightspan") if isinstance(checkpoint, dict) else None
    written = stamp.get("format") if isinstance(stamp, dict) else None
    if isinstance(stamp, dict) and isinstance(written, int) and written > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {written} (written by lightspan {stamp.get('version')}), but "
            f"lightspan {__version__} reads formats up to {FORMAT}; upgrade lightspan"
        )


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    # A sharded run that continues in one process has left folders under the same names.
    over_folder = (path / COMPLETE).exists()
    with atomic_path(path, over_folder) as temporary, temporary.open("w+b") as file:
        seal_file(file, header(checkpoint), torch_save(checkpoint, file))


def _of_known_form(checkpoint: Any, path: Path) -> dict[str, Any]:
    refuse_newer(checkpoint, path)
    if found := content_fault(checkpoint):
        raise UserError(f"checkpoint {path} {found}; {_others(path)}")
    assert isinstance(checkpoint, dict)
    return checkpoint


def _read(path: Path, map_location: Any, mmap: bool = False) -> Any:
    """The content of a checkpoint file; with `mmap` its tensors stay on disk."""
    require_regular_file(path, "checkpoint")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} contains more than tensors and plain values, so it was not loaded and no code in it "
            f"was run ({cause_of(error)}); {_others(path)}"
        ) from error
    except Exception as error:  # whatever torch raises for an untrusted file
        raise UserError(f"checkpoint {path} is damaged ({cause_of(error)}); {_others(path)}") from error
    if found := expanded(content):
        raise UserError(
            f"checkpoint {path} cannot be used: its entry {found}; save it with `tensor.contiguous()`; {_others(path)}"
        )
    return content


def _others(path: Path) -> str:
    """The way out: what else could be loaded."""
    others = [p for p in checkpoints(path.parent) if p != path] if path.parent.is_dir() else []
    if not others:
        return "give the path of another checkpoint or start without one"
    return "in the same folder: " + ", ".join(p.name for p in others[:4])
