"""Catalogues of furniture: which pieces are found, of which kind, and what their surfaces are."""

from pathlib import Path

import numpy as np
import pytest
from furniture_files import HALVES, NAMES, RED, catalogue

from lightspan.core.errors import UserError
from lightspan.datamodules.points.sets.furniture import CATALOGUES, KINDS, find_pieces, held_out, kind_of, read_piece


def test_names_say_what_a_piece_is() -> None:
    for kind, name in NAMES.items():
        assert KINDS[kind_of(name)] == kind
    likely = (
        *(("lamp", "Desk lamp"), ("cabinet", "Bedside table"), ("cabinet", "Chest of drawers")),
        *(("sofa", "Winchester sofa"), ("cabinet", "Television cabinet"), ("plant", "Christmas tree")),
        *(("chair", "Bar stool"), ("sanitary", "Corner bathtub")),
    )
    for kind, name in likely:
        assert KINDS[kind_of(name)] == kind, name
    assert {kind_of(name) for name in ("Wheelchair", "Table fan", "Table tennis", "Guitar", "Bathmat", "")} == {-1}


def test_pieces_on_the_wall_of_other_rooms_or_too_large_are_left_out(tmp_path: Path) -> None:
    extra = (
        *({"elevation": "120"}, {"category": "Exterior"}, {"width": "310"}, {"height": "0"}),
        *({"model": "/x/none.obj"}, {"elevation": "0"}),
    )
    found = find_pieces(catalogue(tmp_path / "in", 1, tuple({"name": "Chair"} | one for one in extra)))
    assert len(found) == len(KINDS) + 1
    with pytest.raises(UserError, match=r"data\.init_args\.furniture"):
        find_pieces(tmp_path)
    (tmp_path / "Damaged.sh3f").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"Damaged\.sh3f"):
        find_pieces(tmp_path)


def test_a_fifth_of_each_kind_is_held_out_and_at_least_one_of_two(tmp_path: Path) -> None:
    for per_kind, held in ((1, 0), (2, 1), (9, 1), (10, 2)):
        pieces = find_pieces(catalogue(tmp_path / f"{per_kind}", per_kind))
        kinds = np.array([piece.kind for piece in pieces])
        assert np.bincount(kinds[held_out(pieces)], minlength=len(KINDS)).tolist() == [held] * len(KINDS)


def test_surfaces_stand_on_the_floor_in_metres_with_the_colours_of_their_materials(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    turned = {"name": "Chair", "modelRotation": "0 0 1 0 1 0 -1 0 0"}
    root = catalogue(tmp_path / "in", 2, (turned,))
    pieces = find_pieces(root)
    pictured, plain, around = (next(p for p in pieces if p.model == f"test/piece{n}/piece.obj") for n in (0, 1, 22))
    for piece in (pictured, plain, around):
        shape = read_piece(root, piece)
        corners = shape.xyz.reshape(-1, 3)
        np.testing.assert_allclose(corners.min(axis=0), [-0.25, -0.2, 0], atol=1e-6)
        np.testing.assert_allclose(corners.max(axis=0), [0.25, 0.2, 0.8], atol=1e-6)
        assert shape.xyz.shape == (12, 3, 3)
        assert shape.colour is not None
    assert (read_piece(root, plain).colour == RED).all()
    # Left and right in the model are so in the room. Turned by a quarter about the vertical, the model's x becomes its
    # -z, which is the room's y.
    for piece, axis, sign in ((pictured, 0, 1), (around, 1, 1)):
        shape = read_piece(root, piece)
        for side, colour in zip((-sign, sign), HALVES, strict=True):
            assert (shape.colour[shape.xyz[..., axis] * side > 0] == colour).all()


def test_the_catalogues_of_the_system_package_have_all_kinds() -> None:
    if not CATALOGUES.is_dir():
        pytest.skip("the system package sweethome3d-furniture is not installed")
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    pieces = find_pieces(CATALOGUES)
    assert (np.bincount([piece.kind for piece in pieces], minlength=len(KINDS)) >= 5).all()
    for piece in pieces[::40]:
        corners = read_piece(CATALOGUES, piece).xyz.reshape(-1, 3)
        np.testing.assert_allclose(np.ptp(corners, axis=0), piece.size, atol=1e-3)
