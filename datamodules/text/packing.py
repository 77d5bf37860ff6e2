"""Several texts in a row of a batch: fewer rows, and less padding. Shapes: B texts, R rows, T U tokens of a row.

A batch has one side or several, each with its own length: `sides` tells, for the field that numbers the texts of a row,
from 1 up and 0 on padding, which other fields have its length.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SIDES = {"input_segments": ("inputs",), "target_segments": ("decoder_inputs", "targets", "target_bytes", "denoiser")}
"""Of a `DenoisingBatch`."""


def placed(sizes: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
    """Rows, each a list of texts, by first fit with the largest first: a row has room for all its texts on all sides.

    Args:
        sizes: tokens of each text on each side, none above `room`.
    """
    rows: list[list[int]] = []
    left: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), i)):
        size = sizes[number]
        fits = (row for row, free in enumerate(left) if all(a <= b for a, b in zip(size, free, strict=True)))
        if (row := next(fits, len(rows))) == len(rows):
            rows.append([])
            left.append([*room])
        rows[row].append(number)
        left[row] = [b - a for a, b in zip(size, left[row], strict=True)]
    return rows


def packed(batch: Mapping[str, Tensor], sides: Mapping[str, Sequence[str]] = SIDES) -> dict[str, Tensor]:
    """A batch of one text a row, on the host, in fewer rows. Segments number the texts of a row from 1.

    `index` is that of the first text of each row. Other fields are those of each text, one after the other.
    """
    sizes = [(batch[segments] > 0).sum(dim=1).tolist() for segments in sides]
    rows = placed(list(zip(*sizes, strict=True)), [batch[segments].shape[1] for segments in sides])
    result = {"index": batch["index"][[row[0] for row in rows]]}
    for (segments, fields), of in zip(sides.items(), sizes, strict=True):
        for name in (segments, *fields):
            source = batch[name]
            filled = _padding(source, batch[segments]).repeat(len(rows), source.shape[1])
            for number, row in enumerate(rows):
                at = 0
                for segment, text in enumerate(row, start=1):
                    end = at + of[text]
                    filled[number, at:end] = segment if name == segments else source[text, : of[text]]
                    at = end
            result[name] = filled
    return {name: result[name] for name in batch}


def trimmed(batch: Mapping[str, Tensor], sides: Mapping[str, Sequence[str]] = SIDES) -> dict[str, Tensor]:
    """A batch on the host without the columns that are padding in every row."""
    widths = {
        name: int((batch[segments] > 0).sum(dim=1).max())
        for segments, fields in sides.items()
        for name in (segments, *fields)
    }
    return {name: values[:, : widths[name]] if name in widths else values for name, values in batch.items()}


def _padding(values: Tensor, segments: Tensor) -> Tensor:
    """[1, 1], what a field has on padding; 0 where it has none."""
    found = values[segments == 0][:1]
    return found.view(1, 1) if len(found) else torch.zeros(1, 1, dtype=values.dtype)
