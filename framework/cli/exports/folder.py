"""The folder of an export: written whole or not at all, and replaced only if an export wrote it."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import discard, explained_os_errors, replace_folder, temporary_path
from lightspan.core.files.runs import EXPORT


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raises: UserError if `out` is there and may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / EXPORT).is_file():
        raise UserError(f"--out {str(out)!r} exists and is not an earlier export; name a folder that does not exist")
    if not overwrite:
        raise UserError(
            f"--out {str(out)!r} contains an earlier export; name another folder, or add --overwrite, which "
            "replaces all that is in it"
        )


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` if the block wrote EXPORT last; otherwise removes it.

    Raises: UserError if the disk is full, or the folder is read-only or cannot be made; other errors pass through.
    """
    out = out.absolute()
    folder = temporary_path(out, secrets.token_hex(4))
    with explained_os_errors(out, setting="--out"):
        folder.mkdir(parents=True)
        try:
            yield folder
            if not (folder / EXPORT).is_file():
                return
            mode = (folder / EXPORT).stat().st_mode
            for path in (found for found in folder.rglob("*") if found.is_file()):
                path.chmod(mode)  # safetensors makes files that only their owner can read
            replace_folder(folder, out)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        finally:
            discard(folder)


def _as_os_error(error: SafetensorError) -> Exception:
    """The error of the system that safetensors has only in its text; any other as it is."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else error
