"""`lightspan fit RECIPE --videos FOLDER`, `--points`, `--graphs` and `--recordings`: the layer that gives a recipe the
user's own files, which are sorted into classes by their folders or not at all (`user_data`).

It replaces the data, keeps those of their settings that `UserFiles.kept` names, and changes what depends on the files:
the channels of the network's first layer, the number of classes, and a batch that they would not fill.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.any_folder.looks import Look, Settings, at_graphs, at_points, at_recordings, at_videos
from lightspan.cli.config.resolve import TRAINED, Resolved
from lightspan.cli.config.user_data import Layer, fitted
from lightspan.cli.config.user_folders import fewer, fitting, watching_callbacks, with_folder, without_labels
from lightspan.core.files.atomic import expanded

if TYPE_CHECKING:
    from lightspan.datamodules.image.picture_files import Kind


def _videos() -> "Kind":
    from lightspan.datamodules.video.files import VIDEOS

    return VIDEOS


def _points() -> "Kind":
    from lightspan.datamodules.points.reading import POINTS

    return POINTS


def _graphs() -> "Kind":
    from lightspan.datamodules.graph.reading import GRAPHS

    return GRAPHS


def _recordings() -> "Kind":
    from lightspan.datamodules.audio.sound import RECORDINGS

    return RECORDINGS


def _not_shots(path: Path, settings: Settings) -> bool:
    return settings.get("samples") != "shots"  # of which there are more than videos


def _one_graph(path: Path, settings: Settings) -> bool:
    from lightspan.datamodules.graph.reading import is_of_molecules

    return not is_of_molecules(path)


@dataclass(frozen=True)
class UserFiles:
    """Files of a kind.

    Attributes:
        option: of the command line.
        modality: of recipes for them.
        data: class path of the data module, which finds them by `find_labelled`.
        kept: settings of the recipe's own data that it keeps.
        kind: which files; what it needs is imported only then.
        look: how to look at one.
        channels: that the network's first layer reads; None leaves that as it is.
        name: of the files, in the plural.
        is_one: whether a file, here the first one, is one sample under the settings of the data.
    """

    option: str
    modality: str
    data: str
    kept: tuple[str, ...]
    kind: Callable[[], "Kind"]
    look: Callable[[Path, Settings], Look]
    channels: int | None
    name: str = "files"
    is_one: Callable[[Path, Settings], bool] = lambda path, settings: True

    def model_layer(self, resolved: Resolved) -> Layer:
        """What the model takes from the files."""
        from lightspan.datamodules.image.picture_files import find_labelled  # numpy, which other commands do without

        given = resolved.config["data"]["init_args"]
        training = expanded(given["folder"], "data.init_args.folder")
        found = find_labelled(training, self.kind(), given.get("links", "skip"), given.get("labels", "auto"))
        model, count = resolved.config["model"], len(found.names)
        if "num_classes" in (model.get("init_args") or {}) and not found.classes:
            way_out = f"put the {self.name} of each class into a sub-folder of its name"
            raise without_labels(resolved, training, way_out)
        notes = [f"{self.option}: {count:,} {self.name.removesuffix('s') if count == 1 else self.name} in {training}"]
        wanted = fitting(self.channels, len(found.classes) or None)
        layer: dict[str, Any] = {"model": {"init_args": fitted(model, wanted, notes)}}
        if self.is_one(training / found.names[0], given):
            batch = fewer(given.get("batch_size"), count, self.name, notes)
            layer |= {"data": {"init_args": {"batch_size": batch}}} if batch != given.get("batch_size") else {}
        layer["trainer"] = {"callbacks": watching_callbacks(resolved, bool(found.classes), count, notes, maps=False)}
        return layer, notes


USER_FILES = (
    UserFiles(
        option="--videos",
        modality="video",
        data="lightspan.datamodules.video.folder.VideoFolder",
        kept=("frames", "fps", "clips", "speeds", "size", "views", "views_on", "batch_size", "seed"),
        kind=_videos,
        look=at_videos,
        channels=3,
        name="videos",
        is_one=_not_shots,
    ),
    UserFiles(
        option="--points",
        modality="points",
        data="lightspan.datamodules.points.folder.PointFolder",
        kept=("points", "fields", "normalise", "batch_size", "augment", "seed"),
        kind=_points,
        look=at_points,
        channels=3,
    ),
    UserFiles(
        option="--graphs",
        modality="graph",
        data="lightspan.datamodules.graph.folder.GraphFolder",
        kept=("node_kinds", "edge_kinds", "batch_size", "seed"),
        kind=_graphs,
        look=at_graphs,
        channels=None,
        is_one=_one_graph,
    ),
    UserFiles(
        option="--recordings",
        modality="audio",
        data="lightspan.datamodules.audio.folder.AudioFolder",
        kept=("rate", "level_db", "batch_size", "seed"),
        kind=_recordings,
        look=at_recordings,
        channels=None,
        name="recordings",
    ),
)
"""In the order of their options."""


def with_files(
    own: UserFiles,
    recipe: str,
    overlays: Sequence[str],
    folder: Path,
    flags: Sequence[str],
    allow_modules: Sequence[str] = (),
    kinds: Sequence[str] = TRAINED,
) -> Resolved:
    """See `with_folder`."""
    place = partial(with_folder, own.option, own.modality, own.data, own.kept, own.model_layer)
    return place(recipe, overlays, folder, flags, allow_modules, kinds)
