"""Real furniture of Sweet Home 3D's catalogues, from a system package: coloured surfaces in metres, by kind.

A catalogue is a zip archive with a list of properties, and for each piece an OBJ file with its materials and pictures.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import BYTES, PIXELS
from lightspan.datamodules.points.reading import as_damage, meshes_in
from lightspan.datamodules.points.shapes import Shape, shape_of

CATALOGUES = Path("/usr/share/sweethome3d/furniture")
"""Where Debian's package sweethome3d-furniture has them. By catalogue CC BY 3.0, or CC0."""
KINDS = (
    *("chair", "armchair", "sofa", "table", "bed", "cabinet"),
    *("shelf", "lamp", "plant", "sanitary", "appliance"),
)
"""What pieces are, by their English names; the order is that of labels."""
# The first pattern that is found in a name decides: a desk lamp is no desk, and a wheelchair no chair.
_NAMED = (
    (
        "",
        r"fan|tennis|pool|football|wheel|deck|bench|brush|remote|cloth|ottoman|mattress|potty|head and|door|curtain|"
        r"flash|street|park|camp|induct",
    ),
    ("sanitary", r"toilets|washbasin|bath\b|bathtub|shower stall|bidet|urinal|vanity|lavatory"),
    ("appliance", r"oven|fridge|refrigerator|washing|dryer|stove|freezer|cooker\b|dishwasher"),
    ("cabinet", r"wardrobe|cabinet|cupboard|\bchest|dresser|bedside table|locker|vertical drawers"),
    ("lamp", r"lamp\b|light\b"),
    ("armchair", r"armchair|relax"),
    ("chair", r"chair|stool|seat\b"),
    ("sofa", r"sofa(?! [23] seats)|couch"),
    ("bed", r"\bbed\b|crib|futon"),
    ("shelf", r"bookcase|shelves"),
    ("table", r"table\b|desk\b|tables"),
    ("plant", r"plant|ficus|yucca|bamboo|tulip|flowers|cactus|lily|orchid|tree|spathi|succulent"),
)
_ROOMS = {"Living room", "Bedroom", "Kitchen", "Office", "Bathroom", "Lights"}
_LARGEST = 2**20  # bytes of an OBJ file: about 15,000 triangles
_PROPERTY = re.compile(r"^(\w+)#(\d+)=(.*)$")
_METRES = 0.01  # of the catalogues' unit
_MOST_WIDE = 3.0  # metres
GREY = 160
LIST = "PluginFurnitureCatalog.properties"


class Piece(NamedTuple):
    """A piece of furniture as a catalogue lists it.

    archive: file name of the catalogue. model: of the OBJ file in it.
    kind: a place in `KINDS`.
    size: metres of its width, its depth and its height.
    turn: what its model is turned by, nine numbers in rows.
    """

    archive: str
    model: str
    name: str
    kind: int
    size: tuple[float, float, float]
    turn: tuple[float, ...]


def kind_of(name: str) -> int:
    """A place in `KINDS`; -1 for a name of something else."""
    said = next((kind for kind, pattern in _NAMED if re.search(pattern, name.lower())), "")
    return KINDS.index(said) if said else -1


def find_pieces(root: Path) -> list[Piece]:
    """The pieces of these kinds in all catalogues of a folder that stand on a floor, in the order of their names.

    Raises: UserError for a folder without any, and for a damaged catalogue.
    """
    found = list[Piece]()
    for archive in sorted(root.glob("*.sh3f")):
        try:
            found += _listed(archive)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive} is no catalogue of furniture: {one_line(str(error))}; remove it") from error
    if not found:
        raise UserError(
            f"{root} has no catalogue of furniture (*.sh3f) with pieces; install the system package "
            "sweethome3d-furniture, or set data.init_args.furniture to a folder of catalogues of Sweet Home 3D"
        )
    return sorted(found, key=lambda piece: (piece.archive, piece.model))


def held_out(pieces: Sequence[Piece]) -> np.ndarray:
    """Which pieces are kept from training, bool [N]: of each kind a fifth, at least one of two, the first by a hash."""

    def digest(at: int) -> bytes:
        return hashlib.sha256(f"{pieces[at].archive}/{pieces[at].model}".encode()).digest()

    held = np.zeros(len(pieces), bool)
    for kind in range(len(KINDS)):
        own = sorted((at for at, piece in enumerate(pieces) if piece.kind == kind), key=digest)
        held[own[: max(len(own) // 5, 1) if len(own) > 1 else 0]] = True
    return held


def _listed(archive: Path) -> Iterator[Piece]:
    with zipfile.ZipFile(archive) as files:
        BYTES.require(files.getinfo(LIST).file_size)
        text = files.read(LIST).decode("latin-1")
        sizes = {info.filename: info.file_size for info in files.infolist()}
    listed = dict[int, dict[str, str]]()
    for line in text.splitlines():
        if said := _PROPERTY.match(line.strip()):
            listed.setdefault(int(said[2]), {})[said[1]] = said[3]
    for about in listed.values():
        model, kind = about.get("model", "").lstrip("/"), kind_of(about.get("name", ""))
        size = tuple(_METRES * float(about.get(side, 0)) for side in ("width", "depth", "height"))
        fits = min(size) > 0 and max(size) <= _MOST_WIDE and sizes.get(model, 2**62) <= _LARGEST
        stands = about.get("category") in _ROOMS and float(about.get("elevation", 0)) == 0
        turn = tuple(map(float, about.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()))
        if fits and stands and kind >= 0 and model.endswith(".obj") and len(turn) == 9:
            yield Piece(archive.name, model, about["name"], kind, size, turn)  # type: ignore[arg-type]


class _Beside(Mapping[str, bytes]):
    """The files beside a model in its archive, by name; nothing else is read."""

    def __init__(self, files: zipfile.ZipFile, folder: str) -> None:
        self.files, self.folder = files, folder

    def __getitem__(self, name: str) -> bytes:
        info = self.files.getinfo(f"{self.folder}/{name.strip()}")
        BYTES.require(info.file_size)
        return self.files.read(info)

    get = __getitem__  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def read_piece(root: Path, piece: Piece) -> Shape:
    """Its surface in metres, standing on z = 0 with its middle at x = y = 0 and its back to the side where y is large.
    Pictures give each corner a colour.

    Raises: ValueError for damage and more than the limits; UserError without the extra `points`.
    """
    folder, _, name = piece.model.rpartition("/")
    with zipfile.ZipFile(root / piece.archive) as files, as_damage():
        beside = _Beside(files, folder)
        meshes = meshes_in(beside[name], "obj", beside)
        meshes = [mesh for mesh in meshes if len(getattr(mesh, "faces", ()))]
        if not meshes:
            raise ValueError("it has no face")
        corners = np.concatenate([np.asarray(mesh.vertices, float)[mesh.faces] for mesh in meshes])
        colours = np.concatenate([_colours(mesh)[mesh.faces] for mesh in meshes])
        corners = corners @ np.reshape(piece.turn, (3, 3)).T
        # Models have their width along x, their height along y and their front towards z.
        shape = shape_of(np.stack([corners[..., 0], -corners[..., 2], corners[..., 1]], axis=-1), colours)
    spans = np.ptp(shape.xyz.reshape(-1, 3), axis=0)
    factors = np.divide(piece.size, spans, out=np.ones(3), where=spans > 0).astype(np.float32)
    return shape._replace(xyz=shape.xyz * factors + np.array([0, 0, piece.size[2] / 2], np.float32))


def _colours(mesh: Any) -> np.ndarray:
    """uint8 [V 3]: of a picture at each vertex, or its mean where a vertex has no place in it, or of the material."""
    material = getattr(mesh.visual, "material", None)
    picture, places = getattr(material, "image", None), getattr(mesh.visual, "uv", None)
    if picture is None:
        plain = getattr(material, "main_color", None)
        return np.tile(np.array([GREY] * 3 if plain is None else plain[:3], np.uint8), (len(mesh.vertices), 1))
    PIXELS.require(picture.width * picture.height)
    pixels = np.asarray(picture.convert("RGB"))
    found = np.tile(pixels.reshape(-1, 3).mean(axis=0).astype(np.uint8), (len(mesh.vertices), 1))
    if places is not None and len(places) == len(mesh.vertices):
        known = np.isfinite(places).all(axis=1)
        u, v = (np.mod(places[known], 1) * [picture.width, picture.height]).astype(int).T
        found[known] = pixels[picture.height - 1 - v.clip(0, picture.height - 1), u.clip(0, picture.width - 1)]
    return found
