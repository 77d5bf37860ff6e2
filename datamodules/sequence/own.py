"""Sequences of one's own, from NumPy's files. No code from a file runs: what would need pickle is refused."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.arrays import read_array, read_arrays
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import opened_regular
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.sequence.sets import Labelled, SequenceSets, SymbolRows, ValueRows, stratified


class OwnSequences(SequenceSets):
    """Sequences of one length with a class each, from `.npz` with arrays `sequences` and `labels`, or two `.npy`.

    Values are [N, L] or [N, L, C]: of uint8, of which 0 becomes -1 and 255 becomes 1, or floating-point numbers, which
    are standardised for each of C with the mean and deviation of the sequences that are trained on (one that is
    constant there becomes 0). Symbols are whole numbers [N, L] from 0 on.

    Args:
        path: of the training sequences; `~` is the home folder.
        labels: of a `.npy` file's labels, whole numbers [N] from 0 on.
        test_path, test_labels: the same for the test sequences. None holds out the last fifth of each class of the
            first file.
        read_as: "values", batches of `SequenceBatch`; or "symbols", of `LabelledTextBatch`.
        padding: the symbol behind the end of a sequence; None: all have the full length.
        settings: those of `SequenceSets`.
    Raises: UserError at setup for files that are missing, broken, or hold other arrays.
    """

    def __init__(
        self,
        path: ReadPath,
        labels: ReadPath | None = None,
        test_path: ReadPath | None = None,
        test_labels: ReadPath | None = None,
        read_as: Literal["values", "symbols"] = "values",
        padding: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.path, self.labels, self.test_path, self.test_labels = path, labels, test_path, test_labels
        self.read_as, self.padding = read_as, padding

    def load(self) -> tuple[Labelled, Labelled]:
        rows, labels = self._read("path", self.path, self.labels)
        if self.test_path is None:
            kept, tested = stratified(labels)
            parts = (rows[kept], labels[kept]), (rows[tested], labels[tested])
        else:
            parts = (rows, labels), self._read("test_path", self.test_path, self.test_labels)
        self.num_classes = int(max(labels.max(initial=0) for _, labels in parts)) + 1
        (training, first), (test, second) = parts
        if training.shape[1:] != test.shape[1:]:
            raise UserError(
                f"sequences of path are {list(training.shape[1:])} each and those of test_path {list(test.shape[1:])}; "
                "both must be of one length"
            )
        if self.read_as == "symbols":
            # Of one type: what is equal in both files is found by its bytes.
            if training.dtype != test.dtype:
                training, test = training.astype(np.int64), test.astype(np.int64)
            return self._symbols(training, first), self._symbols(test, second)
        if training.dtype != test.dtype:
            raise UserError(
                "path and test_path hold different types: bytes (uint8) are scaled to [-1, 1], and other numbers "
                "standardised; save both in one"
            )
        return ValueRows(training, first), ValueRows(test, second)

    def normalised(self, training: Labelled, *others: Labelled) -> list[Labelled]:
        """Floating-point values, by the training sequences' moments."""
        if self.read_as == "symbols" or training.rows.dtype == np.uint8:
            return [training, *others]
        rows = training.rows
        mean, deviation = rows.mean(axis=(0, 1)), rows.std(axis=(0, 1))
        constant = (rows == rows[:1, :1]).all(axis=(0, 1))
        scale = np.where(constant, 0, 1 / np.where(constant, 1, deviation))
        return [ValueRows(((part.rows - mean) * scale).astype(np.float32), part.labels) for part in (training, *others)]

    def _symbols(self, rows: np.ndarray, labels: np.ndarray) -> SymbolRows:
        lengths = np.full(len(rows), rows.shape[1])
        if self.padding is not None:
            own = rows != self.padding
            lengths = np.where(own.any(axis=1), rows.shape[1] - own[:, ::-1].argmax(axis=1), 0)
        return SymbolRows(rows, labels, lengths.astype(np.int64))

    def _read(self, setting: str, path: str, labels: str | None) -> tuple[np.ndarray, np.ndarray]:
        """(sequences [N L C] of values, or [N L] of symbols; labels), checked."""
        file = expanded(path, f"data.init_args.{setting}")
        rows: Any
        classes: Any
        if labels is None:
            arrays = _loaded(file, setting)
            if not isinstance(arrays, dict) or not {"sequences", "labels"} <= arrays.keys():
                held = ", ".join(sorted(arrays)) if isinstance(arrays, dict) else "one array"
                raise UserError(
                    f"data.init_args.{setting}={file} holds {held or 'nothing'}; it needs arrays sequences and labels: "
                    "np.savez(path, sequences=..., labels=...), or name a .npy file of labels as well"
                )
            rows, classes = arrays["sequences"], arrays["labels"]
        else:
            beside = setting.replace("path", "labels")
            rows, classes = _loaded(file, setting), _loaded(expanded(labels, f"data.init_args.{beside}"), beside)
            if isinstance(rows, dict) or isinstance(classes, dict):
                raise UserError(f"data.init_args.{setting} and its labels must both be .npy files, or one .npz file")
        kind = "iu" if self.read_as == "symbols" else "iuf"
        axes = (2,) if self.read_as == "symbols" else (2, 3)
        if rows.dtype.kind not in kind or rows.ndim not in axes or 0 in rows.shape:
            raise UserError(
                f"sequences of {file} are {rows.dtype} {list(rows.shape)}; {self.read_as} are "
                + ("whole numbers [N, L]" if self.read_as == "symbols" else "numbers [N, L] or [N, L, C]")
            )
        if classes.dtype.kind not in "iu" or classes.shape != rows.shape[:1] or classes.min() < 0:
            raise UserError(
                f"labels of {file} are {classes.dtype} {list(classes.shape)}; they must be whole numbers from 0 on, "
                f"one for each of its {len(rows)} sequences"
            )
        if (rows.dtype.kind == "f" and not np.isfinite(rows).all()) or (self.read_as == "symbols" and rows.min() < 0):
            raise UserError(f"sequences of {file} hold NaN, infinite or, as symbols, negative numbers; leave them out")
        if self.read_as == "values" and rows.dtype != np.uint8:
            rows = rows.astype(np.float64)
        shaped = rows[:, :, None] if self.read_as == "values" and rows.ndim == 2 else rows
        return shaped, classes.astype(np.int64)


def _loaded(file: Path, setting: str) -> np.ndarray | dict[str, np.ndarray]:
    try:
        with opened_regular(file) as opened:
            packed = opened.read(2) == b"PK"
        return dict(read_arrays(file)) if packed else read_array(file)
    except ValueError as error:
        raise UserError(f"data.init_args.{setting}={file} cannot be read as NumPy's .npy or .npz: {error}") from error
