"""Windows of text; as bytes: the Python standard library's own source, a folder, or files. No download.

Shapes: T context length.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded, require_regular_file
from lightspan.core.files.folders import LIBRARY_LEAVES_OUT, find_files
from lightspan.core.files.foreign import BYTES, TooMuchError, content_of
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.ranks import evaluation_loader, say, train_loader
from lightspan.datamodules.text.batch import TextBatch

SEPARATOR = b"\0"  # is put between files; a file that contains it counts as binary and is skipped


def text_files(paths: list[str] | None, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(name, path) of what `data.init_args.paths` names: of files in a folder the path in it, of a file its own name.
    A file that several of them name is given once, under its first name, so that no split has it on both sides.

    Args:
        paths: None reads the source of the running Python's standard library, tests and installed packages left out.
        suffixes: endings of the file names taken from folders.
    Raises: UserError for a missing path and for a folder without a matching file.
    """
    if paths is None:
        yield from find_files(Path(os.__file__).resolve().parent, suffixes, LIBRARY_LEAVES_OUT)
        return
    given = set[Path]()
    for name in paths:
        path = expanded(name, "data.init_args.paths")
        if path.is_dir():
            found = list(find_files(path, suffixes, frozenset({"__pycache__"})))
            if not found:
                raise UserError(
                    f"text folder {name} contains no file ending in {' or '.join(suffixes)}; name another "
                    "folder in data.init_args.paths, or the endings of its files in data.init_args.suffixes"
                )
        elif path.exists():
            require_regular_file(path, "text path")
            found = [(path.name, path)]
        else:
            raise UserError(f"text path {name} does not exist; correct data.init_args.paths, or leave it out")
        for inside, file in found:
            if (real := file.resolve()) not in given:
                given.add(real)
                yield inside, file


def text_content(path: Path) -> bytes | None:
    """A text file as it is; None for one that may not be read. Raises: UserError for one above the limit of `BYTES`."""
    try:
        return content_of(path)
    except TooMuchError as error:
        raise UserError(f"the text {path} cannot be used: {error}") from error
    except ValueError:
        return None


def require_within(size: int, what: str) -> None:
    """Raises: UserError for more bytes than the limit of `BYTES`."""
    try:
        BYTES.require(size)
    except ValueError as error:
        raise UserError(f"{what} is too long: {error}") from error


def require_val_fraction(val_fraction: float) -> None:
    """Raises: UserError for a share that holds out nothing or everything."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} is outside (0, 1); 0.05 holds out one file in twenty")


def require_paths(paths: list[str] | None, suffixes: tuple[str, ...]) -> None:
    """Raises: UserError for settings of text files that cannot work, whatever the files are."""
    if paths is not None and not paths:
        raise UserError("paths is an empty list; name a folder or a file, or leave it out for the standard library")
    if paths is not None and "" in paths:
        raise UserError("paths names an empty text, which would be the folder of this process; name a file or folder")
    if not suffixes:
        raise UserError('suffixes is empty, so no file would match; name at least one, such as ".py"')


def in_validation(relative_path: str, val_fraction: float) -> bool:
    """Whether a file is held out: decided only by a hash of its relative path, so it is the same on every machine."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


class Windows:
    """Non-overlapping windows of `width` bytes or tokens over one long text; the incomplete tail is unused."""

    batch_type = TextBatch

    def __init__(self, text: np.ndarray, width: int) -> None:
        self.windows = text[: len(text) // width * width].reshape(-1, width)  # whole numbers [N, width]

    def __len__(self) -> int:
        return len(self.windows)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        """{"tokens": int64 [width]}. The seed is not used: a window has nothing random."""
        return {"tokens": torch.from_numpy(self.windows[index].astype(np.int64))}


class TextData(LightningDataModule, ABC):
    """What all texts that are cut into windows share: batches of `TextBatch`.

    Args:
        context: T, tokens a model reads at once.
        batch_size: windows of one optimiser step over all ranks.
        val_windows: evaluation reads this many windows, evenly spaced and always the same (all if there are fewer).
        seed: of the order of training windows.
        num_workers: processes that fetch batches.
        selection: of windows, as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
    """

    batch_type = TextBatch

    def __init__(
        self,
        context: int,
        batch_size: int,
        val_windows: int = 256,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__()
        if context < 1:
            raise UserError(f"context={context} tokens is too short; it must be at least 1")
        require_numbers(context, context=context)
        if val_windows < 1:
            raise UserError(f"val_windows={val_windows} leaves nothing to validate on; it must be at least 1")
        self.context, self.batch_size, self.val_windows = context, batch_size, val_windows
        self.seed, self.num_workers, self.selection = seed, num_workers, selection
        self.train: Windows | None = None
        self.val: Windows | None = None

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Sets `train` and `val`, once."""

    def train_dataloader(self) -> ExactLoader:
        assert self.train is not None
        settings = self.batch_size, self.seed, self.num_workers, self.trainer
        return train_loader(self.train, *settings, selection=self.selection)

    def val_dataloader(self) -> EvaluationLoader:
        assert self.val is not None
        return self.evaluate(self.val)

    def evaluate(self, windows: Windows) -> EvaluationLoader:
        """Loader of `val_windows` of these windows."""
        count = min(self.val_windows, len(windows))
        indices = [i * len(windows) // count for i in range(count)]
        return evaluation_loader(windows, self.batch_size, self.num_workers, self.trainer, indices)


class ByteText(TextData):
    """Files as windows of bytes: `TextBatch`, tokens int64 [B, T+1] in [0, 256).

    Training and validation are split by file, so no validation text is ever trained on.

    Args:
        paths: folders and files to read. None reads the source of the running Python's standard library, tests and
            installed packages left out. A folder gives the files under it that end in `suffixes`, a file is used as
            it is.
        suffixes: endings of the file names taken from folders.
        val_fraction: share of the files held out, in (0, 1).
        context, batch_size, settings: those of `TextData`.

    Raises: UserError at setup for a missing path, a folder without a matching file, or too little text.
    """

    vocab_size = 256

    def __init__(
        self,
        paths: list[ReadPath] | None = None,
        suffixes: tuple[str, ...] = (".py",),
        context: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        **settings: Any,
    ) -> None:
        super().__init__(context, batch_size, **settings)
        require_val_fraction(val_fraction)
        require_paths(paths, suffixes)
        self.paths, self.suffixes, self.val_fraction = paths, tuple(suffixes), val_fraction

    def setup(self, stage: str | None = None) -> None:
        """Read and split the text, once."""
        if self.train is not None:
            return
        sides: dict[bool, list[bytes]] = {False: [], True: []}
        skipped = total = 0
        for relative_path, path in text_files(self.paths, self.suffixes):
            content = text_content(path)
            if content is None or SEPARATOR in content:
                skipped += 1
                continue
            sides[in_validation(relative_path, self.val_fraction)].append(content)
            total += len(content)
            require_within(total, "the text of data.init_args.paths")
        self.train = self._windows("training", sides[False], skipped)
        self.val = self._windows("validation", sides[True], skipped)
        say(
            f"text: {len(sides[False])} training and {len(sides[True])} validation files, {total / 1e6:.1f} MB, "
            f"{len(self.train)} and {len(self.val)} windows of {self.context + 1} bytes"
            + (f"; {skipped} binary or unreadable files skipped" if skipped else "")
        )

    def _windows(self, side: str, contents: list[bytes], skipped: int) -> Windows:
        windows = Windows(np.frombuffer(SEPARATOR.join(contents), dtype=np.uint8), self.context + 1)
        if not len(windows):
            raise UserError(
                f"too little {side} text: {sum(map(len, contents))} bytes in {len(contents)} files ({skipped} binary "
                f"or unreadable ones skipped), less than one window of context + 1 = {self.context + 1} bytes; whole "
                f"files are held out with val_fraction={self.val_fraction}, so give more files or text, change "
                "val_fraction, or lower context"
            )
        return windows
