"""The kinds of data that a folder may hold, each told by what its own reader takes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightspan.cli.any_folder.looks import Look, Settings, at_pictures, at_tables, at_texts, at_volumes
from lightspan.cli.config.user_files import USER_FILES
from lightspan.datamodules.graph.reading import GRAPHS
from lightspan.datamodules.image.picture_files import PICTURES, Kind
from lightspan.datamodules.table.columns import TABLES
from lightspan.datamodules.text.endings import TEXTS
from lightspan.datamodules.volume.subjects import VOLUMES


@dataclass(frozen=True)
class DataKind:
    """Files of one kind, and what of the command line takes them.

    Attributes:
        option: that takes a folder of them, or of tables a file; empty of texts, which a setting names.
        modality: of recipes for them.
        kind: which files.
        look: how to look at one.
        has_classes: whether sub-folders are classes unless the user says otherwise.
    """

    option: str
    modality: str
    kind: Kind
    look: Callable[[Path, Settings], Look]
    has_classes: bool = True

    @property
    def one(self) -> str:
        """What a file is called."""
        return f"{self.kind.name} file" if self.kind.holds_several else self.kind.name

    @property
    def name(self) -> str:
        """In the plural."""
        return f"{self.one}s"


KINDS = (
    DataKind("--images", "image", PICTURES, at_pictures),
    DataKind("--volumes", "volume", VOLUMES, at_volumes, has_classes=False),
    *(DataKind(own.option, own.modality, own.kind(), own.look) for own in USER_FILES),
    DataKind("--table", "table", TABLES, at_tables, has_classes=False),
    DataKind("", "text", TEXTS, at_texts, has_classes=False),
)
DESCRIBING = ("table", "text")
"""Modalities of files that describe others beside them, such as lists of labels, captions and README files."""
SHARED = tuple(ending for ending in GRAPHS.endings if ending in TABLES.endings or ending == ".json")
"""Endings of graphs that files of other kinds have too, so that their first lines tell."""
EVERY_ENDING = tuple({ending for one in KINDS for ending in one.kind.endings})
