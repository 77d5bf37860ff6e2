"""Reading and writing checkpoint files: whole or not at all, and without unpickling anything foreign."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from lightspan import __version__
from lightspan.errors import UserError
from lightspan.files import atomic_path

FORMAT = 1
"""Rises when a checkpoint of ours can no longer be read by older code."""


class WholeFileCheckpointIO(CheckpointIO):
    """One local file a checkpoint: saved through a temporary name, loaded with `weights_only=True` and nothing else.

    `loaded_stamp` is what lightspan wrote about itself into the checkpoint loaded last (version, format, classes).
    """

    def __init__(self) -> None:
        self.loaded_stamp: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises: UserError when the file cannot be written; what stood at `path` then still stands."""
        if storage_options is not None:
            raise UserError(
                f"storage_options={storage_options!r}: checkpoints go to local files, which have none; omit it"
            )
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            writer: Any = _KeepsOSError(file)
            try:
                torch.save(checkpoint, writer)
            except RuntimeError as error:
                # torch's zip writer replaces the cause (disk full) by a message about file positions.
                raise writer.error or error from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises: UserError when the file is missing, torn, foreign, no checkpoint, or of a newer format."""
        if weights_only is False:
            raise UserError(
                f"weights_only=False for checkpoint {path}: loading could run code hidden in the file; "
                "leave weights_only unset and keep only tensors and plain values in checkpoints"
            )
        path = Path(path)
        if not path.is_file():
            what = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
            raise UserError(f"checkpoint {path} {what}; {_others(path)}")
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
            raise UserError(f"checkpoint {path} {_damage(path, error)}; {_others(path)}") from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            found = f"the keys {sorted(map(str, checkpoint))[:5]}" if isinstance(checkpoint, dict) else type(checkpoint)
            raise UserError(
                f"{path} is a torch file but no checkpoint: it holds {found}, no 'state_dict'; {_others(path)}"
            )
        self.loaded_stamp = stamp = checkpoint.get("lightspan", {})
        if stamp.get("format", FORMAT) > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {stamp['format']} (written by lightspan {stamp.get('version')}), and "
                f"lightspan {__version__} reads formats up to {FORMAT}; upgrade lightspan"
            )
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class _KeepsOSError:
    """A file for torch.save that remembers why a write failed."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        return "is empty"
    if head[:2] != b"PK":
        return "is not a file that torch.save wrote"
    if not zipfile.is_zipfile(path):
        return f"is cut off after {path.stat().st_size} bytes: its end is missing"
    if isinstance(error, UnpicklingError):
        return (
            "holds more than tensors and plain values, so it was not loaded and nothing in it ran "
            f"({str(error).splitlines()[0]})"
        )
    return f"is damaged ({str(error).splitlines()[0]})"


def _others(path: Path) -> str:
    """The way out: what else could be loaded."""
    others = [p for p in path.parent.glob("*.ckpt") if p != path] if path.parent.is_dir() else []
    if not others:
        return "give the path of another checkpoint or start without one"
    newest_first = sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)
    return "in the same folder: " + ", ".join(p.name for p in newest_first[:4])
