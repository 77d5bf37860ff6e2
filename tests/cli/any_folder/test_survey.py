"""What is found in a folder, and the one kind that is meant."""

from pathlib import Path

import pytest
from graph_files import rings
from picture_files import write_pictures
from point_files import bricks

from lightspan.cli.any_folder import survey as module
from lightspan.cli.any_folder.kinds import EVERY_ENDING, KINDS
from lightspan.cli.any_folder.survey import survey
from lightspan.core.errors import UserError


def counts(folder: Path) -> dict[str, int]:
    return {found.kind.name: len(found.names) for found in survey(folder).kinds}


def test_kinds_are_counted_with_sizes_of_those_that_were_opened_and_the_rest_by_ending(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 6, "b": 6})
    for name in ("x.xyz", "y.xyz", "none", ".hidden.png"):
        (tmp_path / name).touch()
    found = survey(tmp_path)
    (pictures,) = found.kinds
    assert found.main() is pictures
    assert (len(pictures.names), pictures.opened, pictures.faults) == (12, module.MOST_OPENED, [])
    assert pictures.sizes["pixels wide"] == (12, 12)
    assert pictures.said().startswith("12 pictures, 12 pixels wide, 12 to 14 pixels high (8 were opened)")
    assert found.lines(pictures) == ["3 files of other kinds: left out (2 .xyz, 1 without an ending)"]


def test_sub_folders_are_classes_as_the_data_module_has_them(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in" / "train", {"a": 3, "b": 1})
    write_pictures(tmp_path / "in" / "val", {"a": 1})
    found = survey(tmp_path / "in")
    classes = found.classes(found.main())
    assert (classes.counts, classes.validates) == ({"a": 3, "b": 1}, True)
    assert classes.said() == "2 classes by sub-folder: a 3, b 1"
    flat = survey(tmp_path / "in" / "train" / "a")
    assert flat.classes(flat.main()).counts == {}
    assert flat.classes(flat.main()).said() == "no labels: there are no sub-folders"
    (tmp_path / "in" / "train" / "b" / "000.png").rename(tmp_path / "in" / "train" / "b.png")
    mixed = survey(tmp_path / "in" / "train")
    assert mixed.classes(mixed.main()).said() == "no labels: the sub-folders are not classes"


def test_graphs_are_told_from_tables_and_other_json_by_their_first_lines(tmp_path: Path) -> None:
    rings(tmp_path, 2)
    (tmp_path / "edges.csv").write_text("source,target\n1,2\n2,3\n")
    (tmp_path / "molecules.csv").write_text("name,SMILES\nwater,O\n")
    (tmp_path / "house.csv").write_text("rooms,price\n3,200\n")
    (tmp_path / "about.json").write_text('{"name": "nodes"}')
    found = survey(tmp_path)
    assert counts(tmp_path) == {"graph files": 4, "tables": 1}
    assert found.below.others == {".json": 1}


def test_molecules_are_counted_in_their_files(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    (tmp_path / "of.smi").write_text("CCO\nCCN\nO\n")
    assert survey(tmp_path).main().said() == "1 graph file, 3 molecules"


def test_of_very_many_files_the_most_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOLD_APART", 3)
    rings(tmp_path, 9)
    assert counts(tmp_path) == {"graph files": 9}
    for number in range(9):
        (tmp_path / f"r{number}.json").write_text("{}")
    assert counts(tmp_path) == {}


def test_texts_and_tables_describe_what_is_beside_them_and_two_kinds_are_asked_about(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 4})
    (tmp_path / "README.md").write_text("About.")
    (tmp_path / "labels.csv").write_text("file,label\na,b\n")
    found = survey(tmp_path)
    assert found.main().kind.option == "--images"
    assert [line.split(",")[0] for line in found.lines(found.main())] == ["1 table", "1 text"]
    bricks(tmp_path / "bricks", 2)
    with pytest.raises(UserError, match=r"4 pictures \(--images\), 2 clouds \(--points\)"):
        survey(tmp_path).main()
    bricks(tmp_path / "more", 60)
    assert survey(tmp_path).main().kind.option == "--points"


def test_more_texts_than_pictures_are_no_description_of_them(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 2})
    for number in range(4):
        (tmp_path / f"{number}.md").write_text("Words.")
    with pytest.raises(UserError, match=r"4 texts \(data.init_args.paths\), 2 pictures"):
        survey(tmp_path).main()


def test_files_that_none_can_read_are_set_aside_or_named(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("<html>")
    with pytest.raises(UserError, match=r"3 pictures, but none of the 3 that were opened.*0.jpg \(it is not a JPEG"):
        survey(tmp_path).main()
    bricks(tmp_path / "bricks", 2)
    found = survey(tmp_path)
    assert found.main().kind.option == "--points"
    assert "0.jpg" in found.lines(found.main())[0]
    (tmp_path / "bricks" / "b0.dat").write_text("0 Nothing\n")
    found = survey(tmp_path)
    assert "1 of 2 that were opened cannot be read: bricks/b0.dat (" in " ".join(found.lines(found.main()))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "is empty"),
        (("a.xyz", "b.xyz"), "holds 2 files, none of which is read here: 2 .xyz"),
        ((".hidden.png",), "is empty"),
    ],
)
def test_a_folder_without_a_file_to_read_says_what_is_read(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{said}.*JPEG.*NIfTI.*MP4.*PLY.*SMILES.*WAV.*Parquet.*JSON Lines"):
        survey(tmp_path).main()


def test_links_are_counted_and_not_followed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "out", {"a": 2})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "away").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match=r"nothing but links \(1\).*links=follow"):
        survey(tmp_path / "in").main()
    write_pictures(tmp_path / "in", {"b": 2})
    found = survey(tmp_path / "in")
    assert found.lines(found.main()) == ["1 link: not followed (data.init_args.links=follow does)"]
    assert survey(tmp_path / "in" / "away").main()  # what the user names is meant
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="nothing but links"):
        survey(tmp_path / "own").main()


def test_counting_stops_in_a_folder_of_very_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ENTRIES", 5)
    write_pictures(tmp_path, {"a": 9})
    found = survey(tmp_path)
    assert (len(found.main().names), found.below.whole) == (4, False)  # and one folder
    assert found.lines(found.main()) == ["counted to 5 files and folders; there are more, and the run reads all"]


def test_large_files_are_left_unopened_where_there_are_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("long" * 9)
    assert survey(tmp_path).main().sizes == {"characters": (5, 5)}
    (tmp_path / "a.txt").write_text("longer" * 9)
    assert survey(tmp_path).main().sizes == {"characters": (36, 36)}


def test_slices_of_a_series_are_one_volume(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="the extra `volumes` is not installed")
    from volume_files import noise, write_nifti, write_series

    write_series(tmp_path / "scan", noise(0))
    write_nifti(tmp_path / "other.nii.gz", noise(1, (4, 7, 5)))
    found = survey(tmp_path).main()
    assert found.said() == "2 volumes, 4 to 6 slices, 7 rows, 5 columns"


def test_sizes_of_recordings_and_videos(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    pytest.importorskip("av", reason="the extra `video` is not installed")
    from sound_files import write_recordings
    from video_files import numbered, write_video

    write_recordings(tmp_path / "sound", {"": 2}, seconds=0.5)
    assert survey(tmp_path / "sound").main().said() == "2 recordings, 0.5 seconds, 16,000 Hz, 1 channel"
    write_video(tmp_path / "films" / "a.mkv", numbered(5))
    assert survey(tmp_path / "films").main().said() == "1 video, 5 frames, 25 frames a second"


def test_kinds_share_only_the_endings_that_first_lines_tell_apart() -> None:
    of_each = [ending for one in KINDS for ending in one.kind.endings]
    assert {ending for ending in of_each if of_each.count(ending) > 1} == {".csv", ".tsv"}
    assert {*of_each} == {*EVERY_ENDING}


def test_a_reader_that_is_not_installed_is_named_and_leaves_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.ply").write_text("ply")
    (tmp_path / "b.ply").write_text("ply")

    def without(*given: object) -> None:
        raise UserError("points are read by trimesh, which is not installed")

    monkeypatch.setattr("lightspan.datamodules.points.reading.read_shape", without)
    found = survey(tmp_path).main()
    assert (found.said(), found.lacks) == ("2 clouds", "points are read by trimesh, which is not installed")
