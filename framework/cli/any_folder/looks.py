"""How large a file of the user's is, and what is wrong with it, as the project's own reader of its kind has it.

Each function takes the folder and the settings of its data, and gives what looks at one file by its name in the folder.
That raises ValueError or OSError for a file that cannot be read, and UserError for what this machine lacks to read it.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

MOST_ROWS = 1_000
"""Molecules of a file that are read."""


class FileSizes(NamedTuple):
    """Of a file.

    Attributes:
        sizes: unit, in the plural -> how many.
        faults: what is wrong with rows of a file that can be read, a line each.
    """

    sizes: dict[str, float]
    faults: tuple[str, ...] = ()


Look = Callable[[str], FileSizes]
Settings = Mapping[str, Any]


def at_pictures(folder: Path, settings: Settings) -> Look:
    """By headers, and of a PNG the checksums."""
    from lightspan.core.files.foreign import content_of
    from lightspan.datamodules.shards.headers import UNDECODABLE, open_image

    def look(name: str) -> FileSizes:
        try:
            width, height = open_image(content_of(folder / name)).size
        except UNDECODABLE as error:
            raise ValueError(str(error) or type(error).__name__) from error
        return FileSizes({"pixels wide": width, "pixels high": height})

    return look


def at_volumes(folder: Path, settings: Settings) -> Look:
    """By headers; of a DICOM series by those of its slices, whichever of them is named."""
    from lightspan.datamodules.volume.reading import DICOM, VolumeFile

    def look(name: str) -> FileSizes:
        file = VolumeFile(name)
        if name.lower().endswith(DICOM):
            home = (folder / name).parent
            slices = sorted(path.name for path in home.iterdir() if path.name.lower().endswith(DICOM))
            file = VolumeFile(home.relative_to(folder).as_posix(), tuple(slices))
        depth, height, width = file.grid(folder).shape
        return FileSizes({"slices": depth, "rows": height, "columns": width})

    return look


def at_videos(folder: Path, settings: Settings) -> Look:
    """By packets and the first frame, which takes as long as reading the file."""
    from lightspan.datamodules.video.reader import index_of

    def look(name: str) -> FileSizes:
        index = index_of(folder / name)
        return FileSizes({"frames": len(index), "frames a second": index.fps})

    return look


def at_points(folder: Path, settings: Settings) -> Look:
    """By reading all of it, tens of milliseconds."""
    from lightspan.datamodules.points.ldraw import LDrawFiles, library_roots
    from lightspan.datamodules.points.reading import read_shape

    bricks = LDrawFiles(library_roots(folder))

    def look(name: str) -> FileSizes:
        shape = read_shape(folder / name, bricks)
        return FileSizes({"triangles" if shape.is_surface else "points": len(shape.xyz)})

    return look


def at_graphs(folder: Path, settings: Settings) -> Look:
    """By reading all of it, of molecules the first `MOST_ROWS`."""
    from lightspan.datamodules.graph.reading import GraphReader, is_of_molecules

    reader = GraphReader(settings.get("kind", "kind"), (), False)

    def look(name: str) -> FileSizes:
        found = list(islice(reader.read(folder / name), MOST_ROWS))
        faults = tuple(f"{name} row {row} ({one})" for row, one in enumerate(found, 1) if isinstance(one, str))
        if is_of_molecules(folder / name):
            more = " or more" if len(found) == MOST_ROWS else ""
            return FileSizes({f"molecules{more}": len(found)}, faults)
        graphs = [one[0] for one in found if not isinstance(one, str)]
        return FileSizes({"nodes": sum(len(graph.kind) for graph in graphs)}, faults)

    return look


def at_recordings(folder: Path, settings: Settings) -> Look:
    """By headers."""
    from lightspan.datamodules.audio.sound import header

    def look(name: str) -> FileSizes:
        said = header(folder / name)
        return FileSizes({"seconds": said.frames / said.rate, "Hz": said.rate, "channels": said.channels})

    return look


def at_texts(folder: Path, settings: Settings) -> Look:
    """By its bytes, which must be UTF-8."""
    from lightspan.core.files.foreign import whole_text

    def look(name: str) -> FileSizes:
        return FileSizes({"characters": len(whole_text(folder / name))})

    return look


def at_tables(folder: Path, settings: Settings) -> Look:
    """By reading all of it."""
    from lightspan.datamodules.table.columns import read_columns

    def look(name: str) -> FileSizes:
        columns = read_columns(folder / name)
        return FileSizes({"rows": len(next(iter(columns.values()))), "columns": len(columns)})

    return look
