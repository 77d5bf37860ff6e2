"""Scans with classes: what becomes of a file, balls about a point, the split, and files that hold no scan."""

from pathlib import Path

import numpy as np
import pytest
import torch
from point_files import write_scans

from lightspan.core.errors import UserError
from lightspan.datamodules.points.augment import PointAugmentation
from lightspan.datamodules.points.labelled import LabelledScans, scan_of

XYZ, CLASSES = np.array([[1.0, 2, 3], [3, 6, 5], [2, 3, 9]]), np.array([0, -5, 2], np.int8)


def test_points_lie_about_the_middle_of_the_floor_and_those_without_a_place_are_left_out() -> None:
    scan = scan_of({"xyz": XYZ, "classes": CLASSES}, ())
    np.testing.assert_array_equal(scan.xyz, [[-1, -2, 0], [1, 2, 2], [0, -1, 6]])
    np.testing.assert_array_equal(scan.classes, [0, -1, 2])
    lost = np.concatenate([XYZ, [[np.nan, 0, 0], [0, np.inf, 0], [0, 0, 1e13]]])
    again = scan_of({"xyz": lost, "classes": np.zeros(6, int), "colour": np.full((6, 3), 255, np.uint8)}, ("colour",))
    np.testing.assert_array_equal(again.xyz, scan.xyz)
    np.testing.assert_array_equal(again.fields["colour"], np.ones((3, 3), np.float32))
    far = scan_of({"xyz": XYZ + 1e7, "classes": CLASSES}, ())
    np.testing.assert_array_equal(far.xyz, scan.xyz)


def test_normals_have_length_one_whatever_a_file_holds() -> None:
    arrays = {"xyz": XYZ, "classes": CLASSES, "normal": np.array([[0, 0, 1], [0, -3, 4], [0, 0, 0]])}
    np.testing.assert_allclose(scan_of(arrays, ("normal",)).fields["normal"], [[0, 0, 1], [0, -0.6, 0.8], [0, 0, 0]])
    lost = arrays | {"normal": np.array([[np.inf, 0, 0], [np.nan, 0, 1], [0, 2e300, 0]])}
    np.testing.assert_array_equal(scan_of(lost, ("normal",)).fields["normal"], [[0, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_training_sees_a_ball_and_validation_the_whole(tmp_path: Path) -> None:
    data = LabelledScans(str(write_scans(tmp_path / "in", 6)), points=10, val_share=0.3, fields=())
    data.setup()
    assert (len(data.train), len(data.val)) == (4, 2)
    first, again, other = (data.train.sample(0, seed) for seed in (1, 1, 2))
    assert torch.equal(first["xyz"], again["xyz"])
    assert not torch.equal(first["xyz"], other["xyz"])
    whole = data.bank.sample(0, 0)
    apart = (whole["xyz"][:, None] - first["xyz"]).norm(dim=2)
    near = apart.amin(dim=1) == 0
    assert near.sum() == len(first["xyz"]) == 10
    within = [(whole["xyz"] - middle).norm(dim=1) for middle in first["xyz"]]
    assert any(each[near].max() <= each[~near].min() for each in within)
    places = {tuple(at): kind for at, kind in zip(whole["xyz"].tolist(), whole["classes"].tolist(), strict=True)}
    assert [places[tuple(at)] for at in first["xyz"].tolist()] == first["classes"].tolist()
    assert len(data.val.sample(0, 0)["xyz"]) >= 40


def test_a_crop_takes_the_classes_of_its_points_along(tmp_path: Path) -> None:
    folder, augment = write_scans(tmp_path / "in", 4), PointAugmentation(keep=0.5, degrees=(0, 0, 180))
    data = LabelledScans(str(folder), augment=augment, batch_size=3, val_share=0.3)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    changed = data.on_after_batch_transfer(batch, 0)
    assert len(changed["classes"]) == len(changed["xyz"]) == int(changed["offsets"][-1]) < len(batch["xyz"])
    colours = {tuple(c): kind for c, kind in zip(batch["colour"].tolist(), batch["classes"].tolist(), strict=True)}
    assert [colours[tuple(c)] for c in changed["colour"].tolist()] == changed["classes"].tolist()


def test_other_files_make_another_run(tmp_path: Path) -> None:
    folder = write_scans(tmp_path / "in", 6)
    contents = []
    for _ in range(2):
        data = LabelledScans(str(folder), str(folder))
        data.setup()
        contents.append(data.training_content())
        np.savez(folder / "scan0.npz", xyz=XYZ, classes=CLASSES)
    assert contents[0] != contents[1]


def test_folders_and_files_that_hold_no_scan_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing is no folder"):
        LabelledScans(str(tmp_path / "missing")).setup()
    with pytest.raises(UserError, match="val_share"):
        LabelledScans(str(tmp_path), val_share=1.0)
    with pytest.raises(UserError, match="points=0"):
        LabelledScans(str(tmp_path), points=0)
    blank = LabelledScans(str(tmp_path / "missing"), fields=("normal",), points=9).stand_in()
    assert blank is not None
    assert blank["normal"].shape == (18, 3)
    folder = write_scans(tmp_path / "in", 2)
    for arrays, said in (
        ({"xyz": XYZ}, "no classes"),
        ({"xyz": XYZ, "classes": CLASSES}, "no colour"),
        ({"xyz": XYZ[:2], "classes": CLASSES, "colour": XYZ}, "xyz"),
        ({"xyz": XYZ, "classes": CLASSES, "colour": XYZ[:, :2]}, "colour"),
        ({"xyz": XYZ, "classes": XYZ[:, 0], "colour": XYZ}, "classes are float64"),
        ({"xyz": XYZ, "classes": np.array(3), "colour": XYZ}, "xyz"),
        ({"xyz": XYZ * np.nan, "classes": CLASSES, "colour": XYZ}, "no point with a place"),
        ({"xyz": XYZ.astype(str), "classes": CLASSES, "colour": XYZ}, "xyz"),
        ({"xyz": XYZ, "classes": CLASSES, "colour": XYZ}, "colour has 2.0"),
        ({"xyz": XYZ, "classes": CLASSES, "colour": XYZ * np.nan}, "colour has nan"),
        ({"xyz": XYZ, "classes": CLASSES, "colour": np.full((3, 3), 65535, np.uint16)}, "colour has 65535"),
    ):
        for number in range(2):
            np.savez(folder / f"scan{number}.npz", **arrays)
        data = LabelledScans(str(folder), str(folder))
        data.setup()
        with pytest.raises(UserError, match=rf"scan0\.npz.*{said}"):
            data.train.sample(0, 0)
