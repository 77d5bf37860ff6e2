"""A small catalogue of furniture as Sweet Home 3D has them, for tests: boxes of plain and pictured materials."""

import io
import zipfile
from pathlib import Path

from PIL import Image
from point_files import CUBE, QUADS

_KINDS = "chair armchair sofa table bed cabinet shelf lamp plant sanitary appliance"
_SAID = "Chair Armchair Sofa Desk Bed Wardrobe Bookcase Lamp Ficus Bidet Oven"
NAMES = dict(zip(_KINDS.split(), _SAID.split(), strict=True))
RED, HALVES = (255, 0, 0), ((0, 255, 0), (0, 0, 255))
"""Of a plain material; of the left and the right half of a picture."""


def box(materials: str, at_picture: bool = False) -> str:
    """A cube as OBJ, its corners at x = 0 on the left of the picture and those at x = 1 on the right."""
    lines = [f"mtllib {materials}", *(f"v {x} {y} {z}" for x, y, z in CUBE), "vt 0.25 0.5", "vt 0.75 0.5", "usemtl m"]
    for quad in QUADS:
        corners = [f"{at + 1}/{1 + int(CUBE[at][0])}" if at_picture else str(at + 1) for at in quad]
        lines.append("f " + " ".join(corners))
    return "\n".join([*lines, ""])


def catalogue(folder: Path, per_kind: int = 2, extra: tuple[dict[str, str], ...] = ()) -> Path:
    """A folder with a catalogue of `per_kind` boxes of each kind, of 50 x 40 x 80 cm, the first with a picture.

    extra: properties of more pieces, which override those of a chair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    halves, picture = Image.new("RGB", (4, 2), HALVES[0]), io.BytesIO()
    halves.paste(HALVES[1], (2, 0, 4, 2))
    halves.save(picture, "PNG")
    pieces = [{"name": name} for name in NAMES.values() for _ in range(per_kind)] + list(extra)
    with zipfile.ZipFile(folder / "Test.sh3f", "w") as files:
        lines = ["id=Test"]
        for number, own in enumerate(pieces):
            name = f"test/piece{number}"
            about = {"category": "Bedroom", "model": f"/{name}/piece.obj", "width": "50", "depth": "40", "height": "80"}
            lines += [f"{key}#{number + 1}={value}" for key, value in (about | own).items()]
            files.writestr(f"{name}/piece.obj", box("m.mtl", number % per_kind == 0))
            kind = "map_Kd p.png" if number % per_kind == 0 else "Kd 1 0 0"
            files.writestr(f"{name}/m.mtl", f"newmtl m\nKd 1 0 0\n{kind}\n")
            files.writestr(f"{name}/p.png", picture.getvalue())
        files.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
    return folder
