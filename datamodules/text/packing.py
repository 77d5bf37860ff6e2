"""Several texts in a row of a batch: fewer rows, and less padding. Shapes: B texts, R rows, T U tokens of a row."""

from collections.abc import Mapping

import torch
from torch import Tensor

SIDES = {"input_segments": ("inputs",), "target_segments": ("decoder_inputs", "targets", "target_bytes", "denoiser")}
"""Segments of each side of a `DenoisingBatch`, and the fields that have its length."""


def placed(sizes: list[tuple[int, int]], room: tuple[int, int]) -> list[list[int]]:
    """Rows, each a list of texts, by first fit with the largest first: a row has room for all its texts on both sides.

    Args:
        sizes: tokens of each text on both sides, none above `room`.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for number in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), i)):
        a, b = sizes[number]
        row = next((row for row, (c, d) in enumerate(left) if a <= c and b <= d), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(number)
        left[row] = left[row][0] - a, left[row][1] - b
    return rows


def packed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `DenoisingBatch` of one text a row, on the host, in fewer rows. Segments number the texts of a row from 1.

    `index` is that of the first text of each row. Other fields are those of each text, one after the other.
    """
    sizes = [(batch[segments] > 0).sum(dim=1).tolist() for segments in SIDES]
    room = tuple(batch[segments].shape[1] for segments in SIDES)
    rows = placed(list(zip(*sizes, strict=True)), (room[0], room[1]))
    result = {"index": batch["index"][[row[0] for row in rows]]}
    for (segments, fields), of in zip(SIDES.items(), sizes, strict=True):
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


def trimmed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `DenoisingBatch` on the host without the columns that are padding in every row."""
    widths = {
        name: int((batch[segments] > 0).sum(dim=1).max())
        for segments, fields in SIDES.items()
        for name in (segments, *fields)
    }
    return {name: values[:, : widths[name]] if name in widths else values for name, values in batch.items()}


def _padding(values: Tensor, segments: Tensor) -> Tensor:
    """[1, 1], what a field has on padding; 0 where it has none."""
    found = values[segments == 0][:1]
    return found.view(1, 1) if len(found) else torch.zeros(1, 1, dtype=values.dtype)
