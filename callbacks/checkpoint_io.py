"""Reading and writing single-file checkpoints: whole or not at all, and without unpickling anything foreign."""

from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from lightspan import __version__
from lightspan.callbacks.checkpoint_background import Background, staged
from lightspan.callbacks.checkpoint_bytes import torch_save
from lightspan.callbacks.checkpoint_folder import read_folder
from lightspan.callbacks.checkpoint_manifest import COMPLETE, FORMAT, fault, header, seal_file
from lightspan.errors import UserError
from lightspan.files import atomic_path, remove


class WholeFileCheckpointIO(CheckpointIO):
    """One local file a checkpoint: saved through a temporary name with its manifest inside, loaded once that agrees.

    Loading is by `weights_only=True` and nothing else. A folder that several ranks wrote together is read too, whole,
    so that a sharded run can be looked at, or gone on with, where nothing is sharded. `loaded_stamp` is what lightspan
    wrote about itself into the checkpoint loaded last (version, format, classes).

    Args:
        background: writes there and returns once the tensors are copied.
    """

    def __init__(self, background: Background | None = None) -> None:
        self.loaded_stamp: dict[str, Any] = {}
        self._background = background

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises: UserError when the file cannot be written; what stood at `path` then still stands."""
        if storage_options is not None:
            raise UserError(
                f"storage_options={storage_options!r}: checkpoints go to local files, which have none; omit it"
            )
        if self._background is None:
            _write(checkpoint, Path(path))
        else:
            self._background.submit(Path(path), partial(_write, staged(checkpoint), Path(path)))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises: UserError when the checkpoint is missing, torn, foreign, or of a newer format."""
        if weights_only is False:
            raise UserError(
                f"weights_only=False for checkpoint {path}: loading could run code hidden in the file; "
                "leave weights_only unset and keep only tensors and plain values in checkpoints"
            )
        path = Path(path)
        if not path.exists():
            raise UserError(f"checkpoint {path} does not exist; {_others(path)}")
        refuse_torn(path)
        checkpoint = read_folder(path) if path.is_dir() else _read(path, map_location)
        if "state_dict" not in checkpoint:
            raise UserError(
                f"{path} is a torch file but no checkpoint: it holds the keys {sorted(map(str, checkpoint))[:5]}, "
                f"no 'state_dict'; {_others(path)}"
            )
        self.loaded_stamp = checkpoint.get("lightspan", {})
        refuse_newer(self.loaded_stamp, path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def refuse_torn(path: Path) -> None:
    """Raises: UserError when the checkpoint at `path` is not whole, with what could be loaded instead."""
    if found := fault(path):
        raise UserError(f"checkpoint {path} {found.text}; {_others(path)}")


def refuse_newer(stamp: dict[str, Any], path: Path) -> None:
    """Raises: UserError when `stamp` tells of a format that this code does not know."""
    if stamp.get("format", FORMAT) > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {stamp['format']} (written by lightspan {stamp.get('version')}), and "
            f"lightspan {__version__} reads formats up to {FORMAT}; upgrade lightspan"
        )


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    # A sharded run that goes on in one process has left folders under the same names.
    over_folder = (path / COMPLETE).exists()
    with atomic_path(path, over_folder) as temporary, temporary.open("w+b") as file:
        seal_file(file, header(checkpoint), torch_save(checkpoint, file))


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain values, so it was not loaded and nothing in it ran "
            f"({str(error).splitlines()[0]}); {_others(path)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged ({str(error).splitlines()[0]}); {_others(path)}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} is a torch file but no checkpoint: it holds {type(checkpoint)}, no 'state_dict'; {_others(path)}"
        )
    return checkpoint


def _others(path: Path) -> str:
    """The way out: what else could be loaded."""
    others = [p for p in path.parent.glob("[!.]*.ckpt") if p != path] if path.parent.is_dir() else []
    if not others:
        return "give the path of another checkpoint or start without one"
    newest_first = sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)
    return "in the same folder: " + ", ".join(p.name for p in newest_first[:4])
