"""A batch that is not only pictures, drawn: texts, pictures with texts, tables, recordings, clouds of points, graphs.

Shapes: B samples, T tokens, F columns, C H W, N points or nodes of all samples, S samples of a wave.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.core.batches import is_packed, offsets_in, read_names
from lightspan.core.drawing import COLOURS, SOFT, canvas
from lightspan.core.errors import printable
from lightspan.evaluation.label_spaces.layout import plane_layout

LINE, MOST_LINES = 90, 4
"""Letters of a line of text, and lines of a sample."""
ROW_INCHES = 0.8
HIDDEN, SEEN = "#7f9cff", "#0a7a0a"
"""Points that a masked network does not see, and sees."""
MOST_NODES, GRAPH_COLUMNS = 200, 4
"""Nodes of a graph that are drawn, and graphs side by side."""
MOST_COLUMNS = 256  # of a table; what is wider is not seen as colours
WINDOW, DECIBELS = 512, 80.0
"""Samples of a window of a recording's spectrogram, and how far below its loudest cell a cell is black."""


def panels(
    batch: Any,
    rows: int,
    bounds: tuple[Tensor, Tensor] | None,
    tokenizer: Any,
    batch_type: type | None = None,
    beside: Callable[[Any], Mapping[str, Tensor]] | None = None,
    classes: Sequence[str] = (),
    rate: float | None = None,
    seen: Callable[[Any], Tensor] | None = None,
) -> Any | None:
    """A figure of the first `rows` samples, or None for a batch without texts, tables, recordings, points and graphs.

    Args:
        bounds: what is black and white in pictures; see `shown_in_range`.
        tokenizer: turns tokens into text by its `decode`. Without one, tokens below 256 are bytes, and others numbers.
        beside: makes pictures of a batch of clouds or of recordings, [B 3 H W] in [0, 1] by name.
        classes: names of labels, where the data module has some.
        rate: samples of a recording in a second; None counts samples.
        seen: says which points of a batch of clouds the network sees, bool [N].
    """
    if not isinstance(batch, Mapping):
        return None
    labels = _labels(batch, rows, classes)
    if _is_of(batch.get("tokens"), 2) and not batch["tokens"].is_floating_point():
        return _text_figure(batch, rows, labels, bounds, tokenizer)
    if _is_of(batch.get("edge_index"), 2) and is_packed("node", batch, batch_type):
        return _graph_figure(batch, rows, labels, batch_type)
    if _is_of(batch.get("wave"), 2) and _is_of(batch.get("length"), 1):
        return _sound_figure(batch, rows, labels, beside, rate)
    name = next(iter(read_names(batch, batch_type)), "")
    read = batch.get(name)
    if _is_of(read, 2) and is_packed(name, batch, batch_type):
        return _cloud_figure(read, batch, rows, labels, batch_type, beside, seen) if read.shape[1] == 3 else None
    tables = read if isinstance(read, list | tuple) else [read]
    parts = [
        table for table in tables if _is_of(table, 2) and table.is_floating_point() and table.shape[1] <= MOST_COLUMNS
    ]
    return _table_figure(parts, rows, labels) if parts and len(parts) == len(tables) else None


def text_of(tokens_T: Tensor, tokenizer: Any) -> str:
    """The text of a sample, on one line; a character that is none is escaped."""
    numbers = tokens_T.tolist()
    if callable(getattr(tokenizer, "decode", None)):
        try:
            return printable(str(tokenizer.decode(numbers))).replace("\n", "\\n").replace("\t", "\\t")
        except (NotImplementedError, LookupError, ValueError, TypeError):
            pass  # a tokenizer that only encodes, or other tokens than its own
    if all(0 <= number < 256 for number in numbers):
        return printable(bytes(numbers).decode("utf-8", "replace")).replace("\n", "\\n").replace("\t", "\\t")
    return " ".join(map(str, numbers))


def _text_figure(batch: Mapping[str, Any], rows: int, labels: Sequence[str], bounds: Any, tokenizer: Any) -> Any:
    tokens_BT, mask = batch["tokens"][:rows].cpu(), batch.get("mask")
    mask_BT = mask[:rows].cpu().bool() if _is_of(mask, 2) and mask[:rows].shape == tokens_BT.shape else None
    texts = [
        text_of(tokens_T if mask_BT is None else tokens_T[mask_BT[row]], tokenizer)
        for row, tokens_T in enumerate(tokens_BT)
    ]
    image = batch.get("image")
    pictures = shown_in_range(image[:rows].detach(), bounds) if _is_of(image, 4) and image.shape[1] in (1, 3) else None
    columns = 1 if pictures is None else 2
    figure, axes = canvas(
        "", (9.0, ROW_INCHES * len(texts) + 0.2), (len(texts), columns), width_ratios=[8] if columns == 1 else [1, 8]
    )
    for row, text in enumerate(texts):
        for column in range(columns):
            axes[row, column].axis("off")
        if pictures is not None:
            _show(axes[row, 0], pictures[row])
        lines = [text[at : at + LINE] for at in range(0, len(text), LINE)][:MOST_LINES]
        said = "\n".join(lines) + (" ..." if len(text) > LINE * MOST_LINES else "")
        panel = axes[row, -1]
        # Without parsing: a `$` in a text is no formula.
        panel.text(0, 1, said, va="top", family="monospace", fontsize=7, parse_math=False, transform=panel.transAxes)
        panel.text(0, 0, labels[row], va="bottom", fontsize=7, color=SOFT, parse_math=False, transform=panel.transAxes)
    return figure


def _table_figure(tables: Sequence[Tensor], rows: int, labels: Sequence[str]) -> Any:
    parts = [table[:rows].detach().float().cpu() for table in tables]
    size = (2.0 + 0.25 * sum(part.shape[1] for part in parts), 1.2 + 0.25 * len(parts[0]))
    figure, axes = canvas("", (min(size[0], 16.0), size[1]), (1, len(parts)), sharey=True)
    for number, (axis, part) in enumerate(zip(axes[0], parts, strict=True)):
        picture = axis.imshow(part, aspect="auto", cmap="RdBu", vmin=-3, vmax=3)
        axis.set_xlabel("column" if len(parts) == 1 else f"column, view {number + 1}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0, 0].set_yticks(range(len(parts[0])), labels[: len(parts[0])])
    figure.colorbar(picture, ax=axes[0, -1], label="standardised")
    return figure


def spectrogram(wave_S: Tensor) -> Tensor:
    """Decibels below the loudest cell, [F T] in [-80, 0] with low frequencies first; silence is all -80."""
    window = torch.hann_window(WINDOW)
    padded_S = torch.nn.functional.pad(wave_S, (0, max(0, WINDOW - len(wave_S))))
    power_FT = torch.stft(padded_S, WINDOW, WINDOW // 4, window=window, center=False, return_complex=True).abs() ** 2
    loudest = power_FT.max()
    if not loudest > 0:
        return torch.full_like(power_FT, -DECIBELS)
    return (10 * (power_FT / loudest).log10()).clamp_min(-DECIBELS)


def _sound_figure(
    batch: Mapping[str, Any],
    rows: int,
    labels: Sequence[str],
    beside: Callable[[Any], Mapping[str, Tensor]] | None,
    rate: float | None,
) -> Any:
    """The spectrogram of each recording without its padding, then the method's pictures of it."""
    pictures = _made(beside, batch)
    waves = [
        wave_S[:length].detach().float().cpu()
        for wave_S, length in zip(batch["wave"][:rows], batch["length"][:rows].tolist(), strict=True)
    ]
    columns = 1 + len(pictures)
    figure, axes = canvas("", (5.0 * columns, 1.6 * len(waves) + 0.4), (len(waves), columns))
    for row, (wave_S, label) in enumerate(zip(waves, labels, strict=True)):
        ends = (0, len(wave_S) / (rate or 1), 0, rate / 2000 if rate else 0.5)
        shown = {"aspect": "auto", "origin": "lower", "extent": ends, "cmap": "magma", "vmin": -DECIBELS, "vmax": 0}
        axes[row, 0].imshow(spectrogram(wave_S), **shown)
        axes[row, 0].set_title(label, fontsize=8, loc="left", parse_math=False)
        axes[row, 0].set_ylabel("kHz" if rate else "cycles a sample", fontsize=7)
        axes[row, 0].tick_params(labelsize=6)
        for axis, (name, made) in zip(axes[row, 1:], pictures.items(), strict=True):
            axis.axis("off")
            axis.set_title(name, fontsize=8, loc="left")
            _show(axis, made[row])
            axis.set_aspect("auto")
    axes[-1, 0].set_xlabel("seconds" if rate else "samples", fontsize=7)
    return figure


def _made(beside: Callable[[Any], Mapping[str, Tensor]] | None, batch: Any) -> dict[str, Tensor]:
    """The method's pictures of a batch by name."""
    return {} if beside is None else {name: made.detach().float().cpu() for name, made in beside(batch).items()}


def _cloud_figure(
    xyz_N3: Tensor,
    batch: Mapping[str, Any],
    rows: int,
    labels: Sequence[str],
    batch_type: type | None,
    beside: Callable[[Any], Mapping[str, Tensor]] | None,
    seen: Callable[[Any], Tensor] | None,
) -> Any:
    """Each cloud from above and from the side, hidden points in another colour, then its pictures."""
    pictures = _made(beside, batch)
    cuts = [slice(a, b) for a, b in pairwise(offsets_in(batch, batch_type).tolist())]
    clouds = [xyz_N3[cut].detach().float().cpu() for cut in cuts][:rows]
    seen_N = None if seen is None else seen(batch).cpu()
    columns = 2 + len(pictures)
    figure, axes = canvas("", (3.0 * columns, 3.0 * len(clouds) + 0.2), (len(clouds), columns))
    for row, (cloud, label, cut) in enumerate(zip(clouds, labels, cuts, strict=False)):
        for axis, (name, made) in zip(axes[row, 2:], pictures.items(), strict=True):
            axis.axis("off")
            axis.set_title(name, fontsize=8, loc="left")
            _show(axis, made[row])
        for axis, (across, up) in zip(axes[row, :2], ((0, 1), (0, 2)), strict=True):
            if seen_N is None:
                axis.scatter(cloud[:, across], cloud[:, up], s=1)
            else:
                for which, name, colour in ((~seen_N[cut], "hidden", HIDDEN), (seen_N[cut], "seen", SEEN)):
                    axis.scatter(cloud[which, across], cloud[which, up], s=1, color=colour, label=name)
            axis.set_aspect("equal", "datalim")
            axis.locator_params(nbins=5)
            axis.set_xlabel("xyz"[across], fontsize=8)
            axis.set_ylabel("xyz"[up], fontsize=8)
            axis.tick_params(labelsize=7)
        axes[row, 0].set_title(label, fontsize=8, loc="left")
    if seen_N is not None:
        axes[0, 1].legend(fontsize=7, ncols=2, markerscale=4, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def _graph_figure(batch: Mapping[str, Any], rows: int, labels: Sequence[str], batch_type: type | None) -> Any:
    """Each graph with its nodes at such places that neighbours are near, coloured by their kinds. Of a large one the
    first nodes alone are drawn, with the edges between them.
    """
    offsets = offsets_in(batch, batch_type).tolist()
    edges_E2 = batch["edge_index"].cpu().T
    kind_N = batch["kind"].cpu() if _is_of(batch.get("kind"), 1) else torch.zeros(offsets[-1], dtype=torch.int64)
    cuts = [*pairwise(offsets)][:rows]
    columns = min(GRAPH_COLUMNS, len(cuts))
    lines = -(-len(cuts) // columns)
    figure, axes = canvas("", (2.4 * columns, 2.4 * lines + 0.2), (lines, columns))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (first, end), label in zip(axes.flat, cuts, labels, strict=False):
        last = min(end, first + MOST_NODES)
        inside_E = ((edges_E2 >= first) & (edges_E2 < last)).all(dim=1)
        at_N2, ends_E2 = _placed(edges_E2[inside_E] - first, last - first), edges_E2[inside_E] - first
        axis.plot(*at_N2[ends_E2].permute(2, 1, 0), color=SOFT, linewidth=0.6, zorder=1)
        colours = [COLOURS[kind % len(COLOURS)] for kind in kind_N[first:last].tolist()]
        axis.scatter(*at_N2.T, s=max(2.0, 160 / max(last - first, 8)), c=colours or None, zorder=2)
        axis.set_aspect("equal", "datalim")
        shown = "" if last == end else f", of which {last - first:,} are drawn"
        axis.set_title(f"{label + ', ' if label else ''}{end - first:,} nodes{shown}", fontsize=8, loc="left")
    return figure


def _placed(edges_E2: Tensor, nodes: int) -> Tensor:
    """Places of nodes [N 2] whose distances are nearly the numbers of edges between them."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import shortest_path

    steps = coo_array((torch.ones(len(edges_E2)), edges_E2.T.numpy()), shape=(nodes, nodes))
    apart_NN = torch.from_numpy(shortest_path(steps.tocsr(), directed=False, unweighted=True))
    reached_NN = apart_NN.isfinite()
    return plane_layout(apart_NN.where(reached_NN, apart_NN[reached_NN].max() + 1 if nodes else torch.zeros(())))


def _labels(batch: Mapping[str, Any], rows: int, classes: Sequence[str]) -> list[str]:
    """What a sample is to be told as: its class by name, or its label or target, if the batch has one."""
    names = {number: printable(name) for number, name in enumerate(classes)}
    for field in ("label", "target"):
        if _is_of(batch.get(field), 1):
            known = names if field == "label" else {}
            return [known.get(value, f"{field} {value:.4g}") for value in batch[field][:rows].tolist()]
    return [""] * rows


def _show(axis: Any, picture_CHW: Tensor) -> None:
    axis.imshow(picture_CHW.permute(1, 2, 0).expand(-1, -1, 3))


def _is_of(value: Any, axes: int) -> TypeGuard[Tensor]:
    return isinstance(value, torch.Tensor) and value.ndim == axes and len(value) > 0
