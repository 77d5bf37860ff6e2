"""Pictures of volumes and clips in rows and columns with names: which crop, which plane, which frames, how fast.

Shapes: B samples, V crops or clips of each, R rows, K columns, C channels, T frames, D H W voxels, s side of a plane.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.core.drawing import canvas
from lightspan.core.errors import printable

TILE_INCHES, MOST_ROWS, MOST_COLUMNS = 0.85, 24, 16
LEAST_SHARE = 0.01  # of a crop that lies in a base crop, to be told
PLANES = ("axial", "coronal", "sagittal")


class Strip(NamedTuple):
    """Pictures that belong together.

    pictures_RKCHW: one or three channels, all in one range of brightness.
    title: "" for none.
    rows: R names.
    columns: K names; none is allowed.
    first: how many columns stand before a line.
    """

    pictures_RKCHW: Tensor
    title: str
    rows: Sequence[str]
    columns: Sequence[str] = ()
    first: int = 0


def strips_figure(strips: Sequence[Strip], bounds: tuple[Tensor, Tensor] | None) -> Any:
    """One below the other. bounds: black and white, see `shown_in_range`; None takes those of all strips together."""
    joined = torch.cat([strip.pictures_RKCHW.detach().float().flatten(0, 1) for strip in strips])
    shown = shown_in_range(joined, bounds).split([strip.pictures_RKCHW.shape[:2].numel() for strip in strips])
    sizes = [strip.pictures_RKCHW.shape for strip in strips]
    # Of the words above a strip each line takes a sixth of an inch.
    words = [
        0.3 + (max(name.count("\n") for name in strip.columns) + 1 if strip.columns else 0) / 6 for strip in strips
    ]
    inches = [TILE_INCHES * size[0] * size[3] / size[4] + more for size, more in zip(sizes, words, strict=True)]
    width = TILE_INCHES * max(size[1] for size in sizes) + 1.6
    figure, axes = canvas("", (width, sum(inches)), (len(strips), 1), height_ratios=inches)
    for strip, picture, axis in zip(strips, shown, axes[:, 0], strict=True):
        R, K, C, H, W = strip.pictures_RKCHW.shape
        mosaic = picture.view(R, K, C, H, W).permute(0, 3, 1, 4, 2).reshape(R * H, K * W, C).expand(-1, -1, 3)
        axis.imshow(mosaic, extent=(0, K, R, 0), interpolation="nearest", aspect=H / W)
        axis.set_anchor("W")
        axis.hlines(range(1, R), 0, K, color="white", linewidth=1)
        axis.vlines(range(1, K), 0, R, color="white", linewidth=1)
        if strip.first:
            axis.axvline(strip.first, color="white", linewidth=8)
        axis.set_yticks([row + 0.5 for row in range(R)], strip.rows, fontsize=7)
        axis.set_xticks([column + 0.5 for column in range(len(strip.columns))], strip.columns, fontsize=6)
        axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axis.spines[:].set_visible(False)
        axis.set_title(strip.title, fontsize=9, loc="left", parse_math=False)
    return figure


def strips_of(
    batch: Any, rows: int, names: Sequence[str] = (), classes: Sequence[str] = (), channels: Sequence[str] = ()
) -> list[Strip]:
    """The first samples of a batch of volumes or clips, at most `rows` and `MOST_ROWS` rows in all; none of any other.

    A volume is three planes through the middle of each channel, in columns; of several crops, each is a column, and it
    is said where a crop begins and how much of it lies in which base crop. A clip is a row of frames, and it is said
    which ones these are, how many are shown in a second of the video, and how much faster than the slowest it plays.

    Args:
        names: of the samples by `index`, where they have some.
        classes: of the labels, where they are known.
        channels: of volumes, where they have names.
    """
    if not isinstance(batch, Mapping):
        return []
    if "fps" in batch and all(view.shape[1] in (1, 3) for view in _views(batch, "clip")):
        return _clips(batch, rows, _titles(batch, names, classes))
    if "spacing" in batch:
        return _volumes(batch, rows, _titles(batch, names, classes), channels)
    return []


def evenly_spaced(length: int, count: int) -> Tensor:
    """Up to `count` different whole numbers from 0 to length - 1, ascending, int64."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def planes(volume_BCDHW: Tensor) -> list[Tensor]:
    """Of each channel the axial, coronal and sagittal plane through the middle, [B 1 s s] with borders of the least
    value: head or front above, and the patient's right on the left, as radiologists have it.
    """
    shown = volume_BCDHW.flip(2, 3, 4)
    d, h, w = (side // 2 for side in shown.shape[2:])
    parts, side = [shown[:, :, d], shown[:, :, :, h], shown[:, :, :, :, w]], max(shown.shape[2:])
    least, same = float(shown.float().min()), []
    for part in parts:
        high, wide = side - part.shape[2], side - part.shape[3]
        same.append(pad(part, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=least))
    return [part[:, channel, None] for channel in range(shown.shape[1]) for part in same]


def _volumes(batch: Mapping[str, Any], rows: int, titles: Sequence[str], channels: Sequence[str]) -> list[Strip]:
    views = _views(batch, "volume")
    count = views[0].shape[1]
    known = channels if len(channels) == count else [f"channel {channel + 1}" for channel in range(count)]
    parts = [f"{name}\n{plane}" if count > 1 else plane for name in known for plane in PLANES]
    if len(views) == 1:
        tiles_BPCss = torch.stack(planes(views[0][: min(rows, MOST_ROWS)]), dim=1)
        return [Strip(tiles_BPCss, "", titles[: len(tiles_BPCss)], parts)]
    samples = min(rows, len(views[0]), max(1, MOST_ROWS // len(parts)))
    tiles_BPVCss = _stacked([torch.stack(planes(view[:samples]), dim=1) for view in views], dim=2)
    corner_BV3, overlap_BMK = batch["corner"][:samples], batch.get("overlap", [None] * samples)
    return [
        Strip(tiles_PVCss, title, parts, *_crops(corner_V3, overlap_MK))
        for tiles_PVCss, title, corner_V3, overlap_MK in zip(
            tiles_BPVCss, titles, corner_BV3, overlap_BMK, strict=False
        )
    ]


def _crops(corner_V3: Tensor, overlap_MK: Tensor | None) -> tuple[list[str], int]:
    """(what the crops of a volume are called, how many are base crops)."""
    bases, names = 0 if overlap_MK is None else overlap_MK.shape[1], list[str]()
    for view, corner in enumerate(corner_V3.tolist()):
        name = f"base {view + 1}" if view < bases else f"crop {view - bases + 1}"
        names.append(f"{name}\nat {', '.join(map(str, corner))}")
        if overlap_MK is not None and view >= bases:
            shares, places = overlap_MK[view - bases].sort(descending=True, stable=True)
            pairs = zip(shares.tolist(), places.tolist(), strict=True)
            names[-1] += "".join(f"\n{share:.0%} in base {place + 1}" for share, place in pairs if share >= LEAST_SHARE)
    return names, bases


def _clips(batch: Mapping[str, Any], rows: int, titles: Sequence[str]) -> list[Strip]:
    views = _views(batch, "clip")
    B, V, T = len(views[0]), len(views), views[0].shape[2]
    samples, shown_K = min(rows, B, max(1, MOST_ROWS // V)), evenly_spaced(T, MOST_COLUMNS).to(views[0].device)
    tiles_BVKCHW = _stacked([view[:samples].index_select(2, shown_K).transpose(1, 2) for view in views], dim=1)
    fps_BV, frames_BVT = batch["fps"].view(B, V), batch["frames"].view(B, V, T) if "frames" in batch else None
    names = [
        [_clip(fps, max(fps_V), None if frames_BVT is None else frames_BVT[at, view]) for view, fps in enumerate(fps_V)]
        for at, fps_V in enumerate(fps_BV[:samples].tolist())
    ]
    if V > 1:
        return [Strip(*each) for each in zip(tiles_BVKCHW, titles, names, strict=False)]
    said = [f"{title}\n{name}" for title, (name,) in zip(titles, names, strict=False)]
    return [Strip(tiles_BVKCHW[:, 0], "", said)]


def _clip(fps: float, slowest: float, frames_T: Tensor | None) -> str:
    """What a clip is called. slowest: frames in a second of the video, of the clip of this sample that has most."""
    which = "" if frames_T is None else f"frames {int(frames_T[0])} to {int(frames_T[-1])}\n"
    return f"{which}{fps:.4g} a second" + (f", {slowest / fps:.3g} x as fast" if slowest > fps else "")


def _titles(batch: Mapping[str, Any], names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """What samples are called: by their name or number, and their class."""
    index_B, label_B = batch["index"].tolist(), batch["label"].tolist() if "label" in batch else []
    called = [printable(names[index]) if index < len(names) else f"sample {index}" for index in index_B]
    if not classes:
        return called
    return [f"{name}, {printable(classes[label])}" for name, label in zip(called, label_B, strict=True)]


def _views(batch: Mapping[str, Any], single: str) -> list[Tensor]:
    return list(batch["views"]) if "views" in batch else [batch[single]]


def _stacked(tiles: Sequence[Tensor], dim: int) -> Tensor:
    """Pictures [B R C h w], each enlarged to the largest of them by nearest pixels."""
    sides = [max(tile.shape[axis] for tile in tiles) for axis in (-2, -1)]
    same = [interpolate(tile.flatten(0, 1).float(), sides, mode="nearest") for tile in tiles]
    return torch.stack([one.unflatten(0, tile.shape[:2]) for one, tile in zip(same, tiles, strict=True)], dim)
