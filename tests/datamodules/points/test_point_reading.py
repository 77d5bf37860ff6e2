"""Files of points and surfaces: what is read of each kind, and what is refused by name."""

import itertools
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from point_files import CUBE, QUADS, brick, deadly_laz, las, off, ply

from lightspan.datamodules.points.ldraw import LDrawFiles, title_of
from lightspan.datamodules.points.packed import MOST_KEPT, kept
from lightspan.datamodules.points.reading import read_shape
from lightspan.datamodules.points.scans import read_here
from lightspan.datamodules.points.shapes import Shape, shape_of


def read(folder: Path, name: str, content: bytes | str) -> Shape:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_shape(folder / name, LDrawFiles([folder]))


def needs_trimesh() -> None:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")


def test_triangles_come_with_the_colours_and_places_of_the_files_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "LDConfig.ldr").write_text("0 !COLOUR Red  CODE   4   VALUE #B40000   EDGE #333333\n")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "tri.dat").write_text("3 16 0 0 0 1 0 0 0 1 0\n3 0x2010203 0 0 0 1 0 0 0 1 0\n")
    lines = "1 4 10 0 0 2 0 0 0 2 0 0 0 1 TRI.DAT\n1 16 0 0 0 1 0 0 0 1 0 0 0 1 p\\tri.dat\n"
    found = read(tmp_path, "a.ldr", lines)
    assert found.xyz.shape == (4, 3, 3)
    assert found.colour is not None
    assert found.colour[:, 0].tolist() == [[180, 0, 0], [1, 2, 3], [127] * 3, [1, 2, 3]]
    # (x, y, z) -> (x, z, -y), less the middle of the box from (0, 0, -2) to (12, 0, 0)
    assert (found.xyz[0] + [6, 0, -1]).tolist() == [[10, 0, 0], [12, 0, 0], [10, 0, -2]]
    assert (found.xyz[2] + [6, 0, -1]).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, -1]]


def test_ldraw_files_that_are_damaged_or_never_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSPAN_MAX_TRIANGLES", "1000")
    line = "1 16 0 0 0 1 0 0 0 1 0 0 0 1 "
    for number in range(70):
        (tmp_path / f"deep{number}.dat").write_text(f"{line}deep{number + 1}.dat\n")
        (tmp_path / f"wide{number}.dat").write_text(f"{line}wide{number + 1}.dat\n" * 2)
    (tmp_path / "wide30.dat").write_text("3 4 0 0 0 1 0 0 0 1 0\n")
    for content, said in (
        ("0 nothing\n", "no triangle"),
        ("3 4 0 0 0\n", "line 1"),
        ("0\n3 4 0 0 0 1 x 0 0 1 0\n", "line 2"),
        (f"{line}a.dat\n", "contains itself"),
        (f"{line}../secret.dat\n", "not in"),
        (f"{line}/etc/hostname\n", "not in"),
        (f"{line}deep0.dat\n", "64 deep"),
        (f"{line}wide0.dat\n", "LIGHTSPAN_MAX_TRIANGLES"),
        ("0 FILE a\n0 FILE b\n", "several models"),
    ):
        with pytest.raises(ValueError, match=said):
            read(tmp_path, "a.dat", content)
    assert len(read(tmp_path, "a.dat", f"{line}wide25.dat\n").xyz) == 32


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a file takes")
def test_levels_of_files_within_files_take_no_more_memory_than_the_limit(tmp_path: Path) -> None:
    line = "1 16 0 0 0 1 0 0 0 1 0 0 0 1 "
    (tmp_path / "deep60.dat").write_text("3 4 0 0 0 1 0 0 0 1 0\n" * 1000)
    (tmp_path / "deep59.dat").write_text(f"{line}deep60.dat\n" * 80)
    for number in range(59):
        (tmp_path / f"deep{number}.dat").write_text(f"{line}deep{number + 1}.dat\n")
    # In a process of its own: this one may have as much address space to spare from earlier tests.
    code = (
        "import sys; from pathlib import Path\n"
        f"from {LDrawFiles.__module__} import LDrawFiles\n"
        f"folder = Path({str(tmp_path)!r}); files = LDrawFiles([folder])\n"
        "print(len(files.triangles(folder / 'deep59.dat')[0]))\n"
        "try: files.triangles(folder / 'deep0.dat')\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    limited = {**os.environ, "LIGHTSPAN_MAX_BYTES": str(2**26)}  # 80,000 triangles take 6.4 MB at each level
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=limited, check=False)
    assert done.stdout == "80000\n"
    assert "LIGHTSPAN_MAX_BYTES" in done.stderr


def test_files_are_found_whatever_their_case_and_links_are_not_followed(tmp_path: Path) -> None:
    brick(tmp_path / "in" / "parts" / "Box.dat")
    brick(tmp_path / "secret.dat")
    (tmp_path / "in" / "parts" / "link.dat").symlink_to(tmp_path / "secret.dat")
    line = "1 16 0 0 0 1 0 0 0 1 0 0 0 1 "
    assert len(read(tmp_path / "in", "a.dat", f"{line}BOX.dat\n").xyz) == 12
    with pytest.raises(ValueError, match=r"link\.dat, which is not in"):
        read(tmp_path / "in", "a.dat", f"{line}link.dat\n")


def test_a_title_is_the_first_line_and_a_category_its_first_word_unless_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("0 Brick  2 x  4\n0 !KEYWORDS red, not round\n")
    assert title_of(tmp_path / "a.dat") == ("Brick 2 x 4", "Brick", ("red", "not round"))
    (tmp_path / "a.dat").write_text("0 Car Roof\n0 !CATEGORY Minifig Accessory\n")
    assert title_of(tmp_path / "a.dat").category == "Minifig Accessory"


def test_surfaces_and_points_are_told_apart(tmp_path: Path) -> None:
    needs_trimesh()
    faces = "".join(f"f {' '.join(str(v + 1) for v in quad)}\n" for quad in QUADS)
    corners = "".join("v {} {} {}\n".format(*corner) for corner in CUBE.tolist())
    for name, content in (("a.ply", ply(CUBE, faces=QUADS)), ("a.obj", corners + faces)):
        found = read(tmp_path, name, content)
        assert found.xyz.shape == (12, 3, 3)
        assert np.abs(found.xyz).tolist() == np.full((12, 3, 3), 0.5).tolist()
    loop = "outer loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\n"
    triangle = f"solid a\nfacet normal 0 0 1\n{loop}endfacet\nendsolid\n"
    assert read(tmp_path, "a.stl", triangle).xyz.shape == (1, 3, 3)
    for name, content in (("b.ply", ply(CUBE)), ("b.obj", corners)):  # vertices without faces
        assert read(tmp_path, name, content).xyz.tolist() == (CUBE - 0.5).tolist()


def test_off_files_are_read_also_where_counts_follow_on_the_line_of_their_name(tmp_path: Path) -> None:
    needs_trimesh()
    for start in ("OFF\n8 6 0\n", "OFF8 6 0\n", "OFF 8 6 12\n", "# a box\n\noff\n# counts\n8 6\n"):
        found = read(tmp_path, "a.off", off(CUBE, start))
        assert found.xyz.shape == (12, 3, 3)
        assert np.abs(found.xyz).tolist() == np.full((12, 3, 3), 0.5).tolist()
    body = off(CUBE, "")
    assert read(tmp_path, "a.off", "OFF\n8 0 0\n" + body).xyz.shape == (8, 3)
    for content, said in (
        ("", "empty"),
        ("ply\n" + body, "no OFF file"),
        ("OFF\n", "header"),
        ("OFF\nmany 6 0\n" + body, "header"),
        ("OFF\n8 60 0\n" + body, "cut short"),
        ("OFF\n8 6 0\n" + body.replace("4 0 1 3 2", "4 0 1 3 9"), "damaged|vertex"),
        ("OFF\n999999999999 6 0\n" + body, "LIGHTSPAN_MAX_NUMBERS"),
        ("OFF\n8 999999999999 0\n" + body, "LIGHTSPAN_MAX_TRIANGLES"),
    ):
        with pytest.raises(ValueError, match=said):
            read(tmp_path, "a.off", content)


def test_colours_and_normals_of_files_are_read(tmp_path: Path) -> None:
    needs_trimesh()
    coloured = "".join("v {} {} {} 1 0 0\n".format(*corner) for corner in CUBE.tolist())
    found = read(tmp_path, "a.obj", coloured + "f 1 2 3\n")
    assert found.colour is not None
    assert found.colour.tolist() == [[[255, 0, 0]] * 3]
    normals = np.array([[0, 0, 2.0], [np.nan, 0, 0], [0, 0, 0], [0, 1e300, 0], *np.ones((4, 3))])
    normal = read(tmp_path, "a.ply", ply(CUBE, normals)).normal
    assert normal is not None
    assert normal[:4].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(normal[4:], 3**-0.5, rtol=1e-6)


def test_survey_coordinates_keep_their_millimetres(tmp_path: Path) -> None:
    points = np.array([[500000.001, 4000000.002, 1], [500000.003, 4000000.001, 2], [500001, 4000000, 3]])
    for packed, colour, shown in ((False, 65535, 255), (True, 200, 200)):
        found = read(tmp_path, "a.laz" if packed else "a.las", las(points, packed, colour))
        np.testing.assert_allclose(found.xyz, points - (points.min(0) + points.max(0)) / 2, atol=1e-6)
        assert found.colour is not None
        assert (found.colour == shown).all()


def test_scans_are_read_by_another_process_as_they_would_be_by_this_one(tmp_path: Path) -> None:
    laspy = pytest.importorskip("laspy", reason="the extra `points` is not installed")
    points = np.random.default_rng(0).normal(size=(1000, 3))
    for packed, colour, kind in itertools.product((False, True), (None, 40000), (2, 7)):
        content = las(points, packed, colour, kind)
        found = read(tmp_path, "a.laz", content)
        for array, here in zip(found, read_here(laspy, content), strict=True):
            assert (array is None) == (here is None)
            if array is not None:
                assert array.dtype == here.dtype
                assert np.array_equal(array, here)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a program of a file")
def test_a_scan_that_ends_its_decoder_is_damaged_and_the_next_one_is_read(tmp_path: Path) -> None:
    sound = las(CUBE, packed=True)
    for _ in range(2):  # a process that has read nothing yet, and one that has
        with pytest.raises(ValueError, match=r"SIGABRT.*damaged"):
            read(tmp_path, "bad.laz", deadly_laz())
        assert len(read(tmp_path, "a.laz", sound).xyz) == 8


def test_a_scan_that_claims_more_than_it_has_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = las(CUBE, packed=False)
    for place, said in ((100, "records"), (107, "LIGHTSPAN_MAX_NUMBERS")):
        for count in (2**31, 2**32 - 1):
            with pytest.raises(ValueError, match=said):
                read(tmp_path, "a.las", content[:place] + struct.pack("<I", count) + content[place + 4 :])
    with pytest.raises(ValueError, match="few for 100,000 points"):
        read(tmp_path, "a.las", content[:107] + struct.pack("<I", 10**5) + content[111:])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    needs_trimesh()
    points, whole = ply(CUBE), las(CUBE, packed=True)
    for name, content, said in (
        ("a.ply", b"", "empty"),
        ("a.ply", b"hello", "no PLY"),
        ("a.ply", points[:-12], "cut short"),
        ("a.ply", ply(CUBE, faces=QUADS)[:-12], "cut short"),
        ("a.ply", points.replace(b"vertex 8", b"vertex 999999999999"), "LIGHTSPAN_MAX_NUMBERS"),
        ("a.ply", ply(CUBE, faces=((0, 1, 8),)), "face of vertex"),
        ("a.obj", b"hello", "no point"),
        ("a.obj", b"v 0 0 0\nf 1 2 3\n", "it has a face of a vertex that is not there"),
        ("a.stl", b"", "no point"),
        ("a.stl", bytes(80) + b"\xff\xff\xff\xff", "no point"),
        ("a.las", b"LASF", "damaged"),
        ("a.laz", whole[:-9], "damaged"),
        ("a.laz", whole[:40], "damaged"),
        ("a.ply", ply(np.full((2, 3), np.nan)), "no point with coordinates"),
        ("a.ply", ply(np.array([[1e30, 0, 0], [0, -np.inf, 0]])), "no point with coordinates"),
    ):
        with pytest.raises(ValueError, match=said):
            read(tmp_path, name, content)


def test_damage_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    needs_trimesh()
    loop = "outer loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\n"
    read(tmp_path, "a.stl", f"solid a\nfacet normal x 0 1\n{loop}endfacet\nendsolid\n")
    with warnings.catch_warnings(action="error"):
        read(tmp_path, "a.dat", "3 4 1e400 0 0 1 0 0 0 1 0\n3 4 0 0 0 1 0 0 0 1 0\n")
        with pytest.raises(ValueError, match="no point with coordinates"):
            read(tmp_path, "a.obj", "v inf 0 0\nv nan 1e300 0\nv 1e300 0 -inf\nf 1 2 3\n")
    assert not caplog.records


def test_no_file_that_another_names_is_opened(tmp_path: Path) -> None:
    needs_trimesh()
    (tmp_path / "m.mtl").write_text("newmtl a\nmap_Kd secret.png\nKd 1 0 0\n")
    surface = "mtllib m.mtl\nusemtl a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    assert read(tmp_path, "a.obj", surface).colour is None


def test_points_without_coordinates_are_left_out_with_their_colours() -> None:
    xyz = np.array([[0.0, 0, 0], [np.nan, 0, 0], [1e30, 0, 0], [2, 0, 0]])
    found = shape_of(xyz, np.arange(12, dtype=np.uint8).reshape(4, 3))
    assert found.xyz.tolist() == [[-1, 0, 0], [1, 0, 0]]
    assert found.colour is not None
    assert found.colour.tolist() == [[0, 1, 2], [9, 10, 11]]
    for nothing in (xyz[:0], xyz[1:3]):
        with pytest.raises(ValueError, match="no point"):
            shape_of(nothing)


def test_a_surface_gives_points_by_area_with_its_colours_and_normals() -> None:
    corners = np.array(
        [[[0, 0, 0], [3, 0, 0], [0, 3, 0]], [[0, 0, 5], [1, 0, 5], [0, 1, 5]], [[9, 9, 9]] * 3], np.float32
    )
    colour = np.repeat(np.array([[10] * 3, [20] * 3, [30] * 3], np.uint8)[:, None], 3, axis=1)
    drawn = Shape(corners, colour).drawn(20_000, np.random.default_rng(0))
    assert drawn.colour is not None
    assert drawn.normal is not None
    first = drawn.xyz[:, 2] == 0
    assert {*np.unique(drawn.xyz[:, 2])} == {0, 5}
    assert abs(first.mean() - 0.9) < 0.01
    np.testing.assert_allclose(drawn.xyz[first, :2].mean(0), [1, 1], atol=0.03)  # the triangle's middle
    assert (drawn.xyz[first, :2].sum(1) <= 3 + 1e-5).all()
    assert (drawn.colour[:, 0] == np.where(first, 10, 20)).all()
    assert (drawn.normal == [0, 0, 1]).all()


@pytest.mark.parametrize("unit", [1e-30, 1e12])
def test_very_small_and_very_large_surfaces_are_drawn_by_area_too(unit: float) -> None:
    corners = unit * np.array([[[0, 0, 0], [0.6, 0, 0], [0, 0.6, 0]], [[0, 0, 1], [0.2, 0, 1], [0, 0.2, 1]]])
    drawn = Shape(corners.astype(np.float32)).drawn(4000, np.random.default_rng(0))
    assert abs((drawn.xyz[:, 2] == 0).mean() - 0.9) < 0.02
    assert np.isfinite(drawn.xyz).all()


def test_degenerate_surfaces_and_clouds_give_points_too() -> None:
    generator = np.random.default_rng(0)
    flat = Shape(np.array([[[1.0, 2, 3]] * 3, [[4, 5, 6]] * 3], np.float32)).drawn(50, generator)  # no area
    assert {*map(tuple, flat.xyz.tolist())} == {(1, 2, 3), (4, 5, 6)}
    assert flat.normal is not None
    assert not flat.normal.any()
    one = shape_of(np.array([[7.0, 7, 7]]))
    assert one.drawn(10, generator).xyz.tolist() == [[0, 0, 0]]


def test_many_points_and_triangles_are_thinned_always_alike() -> None:
    grid = np.stack(np.unravel_index(np.arange(MOST_KEPT + 9), (100, 100, 20)), axis=1)
    thin = kept(shape_of(grid))
    assert thin.xyz.shape == (MOST_KEPT, 3)
    assert len(np.unique(thin.xyz, axis=0)) == MOST_KEPT
    assert np.array_equal(kept(shape_of(grid)).xyz, thin.xyz)
    surface = kept(Shape(np.broadcast_to(np.eye(3, dtype=np.float32), (MOST_KEPT + 1, 3, 3))))
    assert surface.xyz.shape == (MOST_KEPT, 3)


def test_bytes_at_random_are_read_or_refused(tmp_path: Path) -> None:
    needs_trimesh()
    generator = np.random.default_rng(0)
    for name, content in (
        ("a.ply", ply(CUBE, faces=QUADS)),
        ("a.las", las(CUBE, packed=False)),
        ("a.dat", brick(tmp_path / "b.dat").read_bytes()),
    ):
        for _ in range(60):
            noisy = bytearray(content)
            for at in generator.integers(len(noisy), size=3):
                noisy[at] = generator.integers(256)
            try:
                found = read(tmp_path, name, bytes(noisy))
            except ValueError:
                continue
            assert np.isfinite(found.xyz).all()
            assert list(itertools.chain(found.xyz.shape))[-1] == 3
