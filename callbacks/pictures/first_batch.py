"""What the network is shown: the first training batch as a picture, after all augmentation.

Shapes: B samples, C H W pictures.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from lightspan.callbacks.pictures.band_colours import coloured_dates
from lightspan.callbacks.pictures.batch_panels import panels
from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.callbacks.pictures.strips import MOST_COLUMNS, evenly_spaced, strips_figure, strips_of
from lightspan.core.batches import batch_type_of, read_names, schema_of, views_field
from lightspan.core.drawing import png
from lightspan.core.errors import UserError, print_notes
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.core.pixels import png_of

LEAST_SIDE = 64  # smaller pictures are enlarged by a whole factor, so that their pixels can be seen


class FirstBatch(Callback):
    """Writes FOLDER/first-batch.png before the first step: a row for each picture, a column for each of its views.

    Views of several sizes are shown at the size of the largest; of a batch without views (`ImageBatch`), eight
    pictures form a row. What is black and white, the data module says by `bounds`. Volumes are shown as planes and
    clips as frames, each crop and clip with a name (`strips_of`), and the samples by the data module's `sample_names`;
    pictures of several tasks are columns, evenly spaced. Of pictures with many bands three are shown, those that the
    data module names in `shown_bands`, each stretched by itself, a column for each date; what is not valid is grey.
    Tokens are drawn as text, by the data module's `tokenizer` or as bytes, beside their pictures if they have some; of
    a table, colours are its standardised numbers; a cloud of points is seen from above and from the side, with
    what a method hides of it (`seen_points(batch)`, bool [N]) in another colour, and a
    recording as its spectrogram, beside the pictures that a method's `pictures(batch)` makes of it, [B 3 H W] in [0, 1]
    by name. Each is labelled with its class, as the data module's `class_names` call it. For any other batch a note
    says that there is no picture.

    Args:
        folder: where the picture goes.
        rows: samples, >= 1.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: RunPath, rows: int = 8) -> None:
        if rows < 1:
            raise UserError(f"FirstBatch rows={rows} must be at least 1")
        self.folder, self.rows = Path(folder), rows
        self._done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._done or trainer.global_step > 0 or not trainer.is_global_zero:
            return
        self._done = True
        data = getattr(trainer, "datamodule", None)
        bounds, path = getattr(data, "bounds", None), self.folder / "first-batch.png"
        kind = batch_type_of(data, pl_module)
        beside = getattr(pl_module, "pictures", None)
        tokenizer, classes = getattr(data, "tokenizer", None), getattr(data, "class_names", None) or ()
        rate = getattr(data, "rate", None)
        seen = getattr(pl_module, "seen_points", None)
        figure = panels(batch, self.rows, bounds, tokenizer, kind, beside, classes, rate, seen)
        names, channels = (getattr(data, name, ()) for name in ("sample_names", "modalities"))
        if figure is None and (strips := strips_of(batch, self.rows, names, classes, [*channels])):
            figure = strips_figure(strips, bounds)
        if figure is not None:
            write_atomic(path, png(figure))
            return
        if (dates := coloured_dates(batch, getattr(data, "shown_bands", None))) is not None:
            rows_BTCHW = dates[: self.rows if dates.shape[1] > 1 else 8 * self.rows]
            columns = dates.shape[1] if dates.shape[1] > 1 else 8
            write_grid(path, enlarged(rows_BTCHW.flatten(0, 1)), columns, padding=1.0)
            return
        views, columns = _pictures(batch, self.rows, kind)
        if not views:
            print_notes([f"FirstBatch has no picture for {f'batches of {kind.__name__}' if kind else 'such batches'}"])
            return
        height, width = (max(view.shape[axis] for view in views) for axis in (2, 3))
        same = [interpolate(shown_in_range(view, bounds), (height, width), mode="nearest") for view in views]
        rows_BVCHW = torch.stack(same, dim=1)
        write_grid(path, enlarged(rows_BVCHW.flatten(0, 1)), columns, padding=0.5)


def enlarged(images_BCHW: Tensor) -> Tensor:
    """By a whole factor, so that the shorter side has `LEAST_SIDE` pixels or nearly."""
    factor = max(1, LEAST_SIDE // min(images_BCHW.shape[2:]))
    return interpolate(images_BCHW, scale_factor=factor, mode="nearest") if factor > 1 else images_BCHW


def write_grid(path: Path, images_BCHW: Tensor, columns: int, padding: float) -> None:
    """Pictures in [0, 1] as one PNG file, row by row; `padding` is the brightness between them."""
    grid_CHW = make_grid(images_BCHW, nrow=columns, pad_value=padding)
    write_atomic(path, png_of(grid_CHW))


def _pictures(batch: Any, rows: int, batch_type: type | None) -> tuple[list[Tensor], int]:
    """(the pictures as columns of a grid, their number); none if the batch has none."""
    name = next(iter(read_names(batch, batch_type)), None) if isinstance(batch, dict) else None
    if name is None:
        return [], 0
    if name == views_field(batch_type):
        columns = list(batch[name])
    elif (columns := _columns(batch[name], name, batch_type)) and len(columns) == 1:
        return ([columns[0][: 8 * rows].detach().float().cpu()], 8) if _is_picture(columns[0]) else ([], 0)
    if not columns or not all(map(_is_picture, columns)):
        return [], 0
    places = evenly_spaced(len(columns), MOST_COLUMNS).tolist()
    return [columns[place][:rows].detach().float().cpu() for place in places], len(places)


def _columns(value: Any, name: str, batch_type: type | None) -> list[Tensor]:
    """Pictures [B C H W] of a field that has these axes, in any order, and perhaps another, such as slices or dates; a
    field of five axes that is not declared has that one second, as tasks.
    """
    if not isinstance(value, Tensor):
        return []
    field = None if batch_type is None else schema_of(batch_type).fields.get(name)
    names = {4: "BCHW", 5: "BKCHW"}.get(value.ndim, "") if field is None else "".join(axis for axis, _ in field.sizes)
    more = [axis for axis in names if axis not in "BCHW"]
    if len(names) != value.ndim or not set("BCHW") <= set(names) or len(more) > 1:
        return []
    ordered = value.permute([names.index(axis) for axis in (*more, *"BCHW")])
    return list(ordered) if more else [ordered]


def _is_picture(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] in (1, 3)
