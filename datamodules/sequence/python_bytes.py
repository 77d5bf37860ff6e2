"""Bytes of real programs: which package of Python's standard library a piece of source is from. No download."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.sequence.sets import Labelled, SequenceSets, SymbolRows
from lightspan.datamodules.text.windows import LIBRARY_LEAVES_OUT, find_files

PACKAGES = ("asyncio", "email", "encodings", "http", "importlib", "multiprocessing", "unittest", "xml")
LEAST = 32
"""Bytes of a file's last piece; a shorter one is left out."""


class PythonBytes(SequenceSets):
    """Pieces of files, byte by byte, whose class is the folder that the file is in: batches of `LabelledTextBatch`.

    A symbol is 1 + a byte; 0 is padding, behind the last piece of a file. Files are held out whole: a fifth of those
    of each class, by a hash of their names, is for testing, and a file with a piece for validation is not trained on.

    Args:
        length: L, bytes of a piece, at least 32.
        packages: folders below `root`, at least two, in the order of their labels; None takes eight of the library's.
        root: None is the folder of the running Python's standard library. Its tests are left out.
        settings: those of `SequenceSets`.
    Raises: UserError at setup for a folder with fewer than two files of Python.
    """

    vocab_size = 257

    def __init__(
        self, length: int = 1024, packages: Sequence[str] | None = None, root: ReadPath | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.packages = PACKAGES if packages is None else tuple(packages)
        if length < LEAST or len(self.packages) < 2 or len(set(self.packages)) < len(self.packages):
            raise UserError(
                f"PythonBytes length={length} must be at least {LEAST}, and packages={list(self.packages)} name at "
                "least two folders, each once"
            )
        self.length, self.root, self.num_classes = length, root, len(self.packages)

    def load(self) -> tuple[Labelled, Labelled]:
        root = Path(os.__file__).resolve().parent if self.root is None else expanded(self.root, "data.init_args.root")
        parts: dict[bool, list[tuple[np.ndarray, int, int, int]]] = {False: [], True: []}
        number = 0
        for label, package in enumerate(self.packages):
            files = sorted(find_files(root / package, (".py",), LIBRARY_LEAVES_OUT), key=lambda found: _hash(found[0]))
            files = [(name, path) for name, path in files if path.stat().st_size >= LEAST]
            if len(files) < 2:
                raise UserError(
                    f"{root / package} has {len(files)} files of Python with at least {LEAST} bytes, and one is needed "
                    "to train on and one to test on; name other folders in data.init_args.packages"
                )
            for place, (_, path) in enumerate(files):
                pieces = parts[place < max(1, len(files) // 5)]
                pieces += [(row, size, label, number) for row, size in self._pieces(content_of(path))]
                number += 1
        return _gathered(parts[False]), _gathered(parts[True])

    def _pieces(self, content: bytes) -> list[tuple[np.ndarray, int]]:
        found = []
        for start in range(0, len(content), self.length):
            piece = np.frombuffer(content[start : start + self.length], dtype=np.uint8).astype(np.int16) + 1
            if len(piece) >= LEAST:
                found.append((np.pad(piece, (0, self.length - len(piece))), len(piece)))
        return found


def _gathered(pieces: list[tuple[np.ndarray, int, int, int]]) -> SymbolRows:
    rows, lengths, labels, files = zip(*pieces, strict=True)
    return SymbolRows(np.stack(rows), *(np.array(column, dtype=np.int64) for column in (labels, lengths, files)))


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
