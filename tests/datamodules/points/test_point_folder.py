"""A folder of points and surfaces as batches: classes, the split, damage, the cache, and what a sample follows from."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from point_files import CUBE, brick, bricks, deadly_laz, las, off, ply

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.points import ldraw
from lightspan.datamodules.points.augment import PointAugmentation
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.datamodules.points.data import PointSets
from lightspan.datamodules.points.folder import PointFolder
from lightspan.datamodules.points.ldraw import Title
from lightspan.datamodules.points.sets.ldraw import BrickPart, LDrawParts, in_test
from lightspan.datamodules.points.sets.modelnet import ModelNet40


def opened(folder: Path, **settings: Any) -> PointFolder:
    given = {"cache_dir": str(folder.parent / "cache"), "points": 40, "batch_size": 2} | settings
    data = PointFolder(str(folder), **given)
    data.setup()
    return data


def batches(data: PointSets, count: int) -> list[dict[str, Any]]:
    loader, found = data.train_dataloader(), []
    while len(found) < count:
        found += list(loader)
    return found[:count]


def test_batches_are_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldraw, "LIBRARY", tmp_path / "none")
    data = opened(bricks(tmp_path / "in", 6), fields=("colour", "normal"))
    for batch in (*batches(data, 2), next(iter(data.val_dataloader())), data.train.sample(0, 0)):
        if "offsets" in batch:
            require_declared(batch, PointsBatch, "PointFolder")
            assert batch["offsets"].diff().tolist() == [40] * len(batch["index"])
        assert (batch["normal"].abs().sum(1) == 1).all()  # of boxes
        assert (batch["colour"] == 127 / 255).all()  # a library without a table of colours
    assert not data.labelled
    assert {path.name for path in (tmp_path / "cache").iterdir()} != set()


def test_samples_are_in_the_unit_sphere_or_in_the_unit_of_the_file(tmp_path: Path) -> None:
    bricks(tmp_path / "in", 4)
    unit, own = opened(tmp_path / "in").bank.sample(0, 0), opened(tmp_path / "in", normalise=False)
    torch.testing.assert_close(unit["xyz"].norm(dim=1).max(), torch.tensor(1.0))
    lengths = sorted(float(np.ptp(own.bank.archive.read(number).xyz[..., 0])) for number in range(4))
    assert lengths == [1, 2, 3, 4]
    assert own.bank.sample(0, 0)["xyz"].abs().max() <= 2


def test_clouds_of_fewer_points_keep_theirs_and_share_a_batch(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    (tmp_path / "in").mkdir()
    for number in range(1, 6):
        (tmp_path / "in" / f"{number}.ply").write_bytes(ply(np.random.default_rng(number).normal(size=(3 * number, 3))))
    data = opened(tmp_path / "in", points=7, batch_size=4, val_share=0.2)
    (batch, *_) = batches(data, 1)
    sizes = [len(data.train.archive.read(int(data.train.numbers[index])).xyz) for index in batch["index"].tolist()]
    assert batch["offsets"].diff().tolist() == [min(7, size) for size in sizes]
    one = opened(tmp_path / "in", points=1, val_share=0.2)
    assert not batches(one, 1)[0]["xyz"].any()  # a point is its own middle


def test_what_is_drawn_follows_from_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    folder, augment = bricks(tmp_path / "in", 7), PointAugmentation(degrees=(0, 0, 180), jitter=0.1)
    straight = batches(opened(folder, augment=augment), 6)
    again = opened(folder, augment=augment, num_workers=1)
    loader = again.train_dataloader()
    first = [batch for _, batch in zip(range(2), loader, strict=False)]
    resumed = opened(folder, augment=augment).train_dataloader()
    state = loader.state_dict()
    resumed.load_state_dict(state)
    rest = [*resumed, *resumed]
    for one, other in zip(straight, [*first, *rest], strict=False):
        assert all(torch.equal(one[name], other[name]) for name in ("xyz", "offsets", "drawn", "seed", "index"))
    clouds = [batch["xyz"][:40] for batch in straight if batch["index"][0] == straight[0]["index"][0]]
    assert all(not torch.equal(clouds[0], other) for other in clouds[1:])
    evaluation = opened(folder, augment=augment, seed=5)
    assert torch.equal(evaluation.bank.sample(1, 3)["xyz"], opened(folder).bank.sample(1, 9)["xyz"])
    for number in range(7):
        brick(folder / f"b{number}.dat", sides=(5, 5, 5))
    other = opened(folder, augment=augment).train_dataloader()
    with pytest.raises(UserError, match="the data"):
        other.load_state_dict(state)


def test_the_batch_is_finished_where_the_model_is(tmp_path: Path) -> None:
    augment = PointAugmentation(keep=0.5, scale=(0.5, 2))
    data = opened(bricks(tmp_path / "in", 5), augment=augment)
    (batch, *_) = batches(data, 1)
    finished = data.on_after_batch_transfer(batch, 0)
    require_declared(finished, PointsBatch, "PointFolder")
    assert finished["offsets"].diff().tolist() != [40, 40]
    held = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(held, 0)["xyz"] is held["xyz"]


def test_sub_folders_are_classes_and_another_folder_may_validate(tmp_path: Path) -> None:
    for name in ("plate", "brick"):
        bricks(tmp_path / "in" / name, 3)
    bricks(tmp_path / "val" / "plate", 2)
    data = opened(tmp_path / "in", val_folder=str(tmp_path / "val"))
    assert data.classes == ("brick", "plate")
    assert data.labelled
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.val.labels().tolist() == [1, 1]
    assert data.val.sample(0, 0)["label"] == 1
    bricks(tmp_path / "val" / "tile", 1)
    with pytest.raises(UserError, match="tile, which is no class"):
        opened(tmp_path / "in", val_folder=str(tmp_path / "val"))


def test_damaged_files_are_named_and_left_out_only_if_the_user_says_so(tmp_path: Path, capsys: Any) -> None:
    bricks(tmp_path / "in", 4)
    (tmp_path / "in" / "empty.dat").write_text("0 Nothing\n")
    (tmp_path / "in" / "broken.dat").write_text("1 16 0 0 0 1 0 0 0 1 0 0 0 1 gone.dat\n")
    (tmp_path / "in" / "link.dat").symlink_to(tmp_path / "in" / "b0.dat")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"(?s)2 of 6 files .*broken\.dat.*gone\.dat.*empty\.dat.*skip_damaged"):
            opened(tmp_path / "in")
    data = opened(tmp_path / "in", skip_damaged=True)
    assert len(data.train) + len(data.val) == 4
    assert "1 links were left out" in capsys.readouterr().out
    for name in ("a", "b"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / f"{name}.dat").write_text("0 Nothing\n")
    with pytest.raises(UserError, match="none of the 2 files"):
        opened(tmp_path / "bad", skip_damaged=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a program of a file")
def test_a_run_goes_on_without_a_scan_that_ends_its_decoder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in {"a": las(CUBE, True), "b": deadly_laz(), "c": las(2 * CUBE, True)}.items():
        (tmp_path / "in" / f"{name}.laz").write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 3 files .*\n.*b\.laz: it .*damaged\n.*skip_damaged"):
        opened(tmp_path / "in")
    data = opened(tmp_path / "in", skip_damaged=True)
    assert len(data.train) + len(data.val) == 2


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    folder = bricks(tmp_path / "in", 3)
    before = opened(folder).training_content()
    assert opened(folder).training_content() == before
    for number in range(3):
        brick(folder / f"b{number}.dat", sides=(9, 9, 9 + number))
    assert opened(folder).training_content() != before


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = str(bricks(tmp_path / "in", 2))
    for settings, said in (
        ({"points": 0}, "points=0"),
        ({"val_share": 1.0}, "val_share=1"),
        ({"fields": ("colour", "colour")}, "fields"),
        ({"cache_gib": 0}, "cache_gib"),
    ):
        with pytest.raises(UserError, match=said):
            PointFolder(folder, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        opened(tmp_path / "empty")


def test_without_the_folder_a_batch_of_its_shape_stands_in(tmp_path: Path) -> None:
    data = PointFolder(str(tmp_path / "none"), points=9, augment=PointAugmentation())
    batch = data.stand_in()
    assert batch is not None
    require_declared(batch, PointsBatch, "PointFolder")
    assert batch["offsets"].tolist() == [0, 9, 18]


def library(folder: Path) -> Path:
    """Forty bricks of one part each, and what is no plain part."""
    for number in range(20):
        for letter in "ab":
            for kind in ("Brick", "Plate"):
                path = folder / "parts" / f"{3000 + number + 100 * (kind == 'Plate')}{letter}.dat"
                text = brick(path, sides=(1 + number, 1, 1)).read_text()
                path.write_text(text.replace("0 Box", f"0 {kind} 1 x {number}"))
    for name, title in (
        ("3001p01.dat", "Brick Red"),
        ("s1.dat", "~Inner"),
        ("x1.dat", "Sticker"),
        ("3001c01.dat", "Brick"),
    ):
        path = folder / "parts" / name
        path.write_text(brick(path).read_text().replace("0 Box", f"0 {title}"))
    return folder


def test_parts_of_a_library_come_with_category_and_title(tmp_path: Path) -> None:
    root = library(tmp_path / "ldraw")
    settings: dict[str, Any] = {"root": str(root), "cache_dir": str(tmp_path / "cache"), "points": 16, "batch_size": 4}
    data = LDrawParts(categories=("Plate", "Brick"), **settings)
    data.setup()
    assert len(data.train) + len(data.val) == 80
    assert data.num_classes == 2
    for samples, captions in ((data.train, data.captions), (data.val, data.val_captions)):
        for index, label in enumerate(samples.labels().tolist()):
            assert captions[index].startswith(data.classes[label])
    few = LDrawParts(categories=("Plate", "Brick"), per_class=3, **settings)
    few.setup()
    assert np.bincount(few.train.labels()).tolist() == [3, 3]
    assert few.val_captions == data.val_captions
    with pytest.raises(UserError, match="'Hose'"):
        LDrawParts(categories=("Hose",), **settings).setup()
    with pytest.raises(UserError, match="install the system package ldraw-parts-free"):
        LDrawParts(root=str(tmp_path / "none")).setup()


def test_versions_of_a_part_are_on_one_side() -> None:
    sides = [
        {in_test(BrickPart(f"{number}{letter}.dat", Title("", "", ()))) for letter in ("", "a", "bc")}
        for number in range(200)
    ]
    assert all(len(side) == 1 for side in sides)
    assert 20 < sum(True in side for side in sides) < 60


def test_modelnet_validates_on_its_own_test_files(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    for number, part in enumerate(("chair/train", "chair/train", "chair/test", "bed/train", "bed/test")):
        (tmp_path / "in" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / part / f"{number}.off").write_text(off(CUBE, "OFF8 6 0\n"))
    data = ModelNet40(str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"))
    data.setup()
    assert data.classes == ("bed", "chair")
    assert data.train is not None
    assert data.train.labels().tolist() == [0, 1, 1]
    assert data.val.labels().tolist() == [0, 1]
    (tmp_path / "in" / "bed" / "new").mkdir()
    (tmp_path / "in" / "bed" / "new" / "a.off").write_text(off(CUBE))
    with pytest.raises(UserError, match=r"new/a\.off"):
        ModelNet40(str(tmp_path / "in"), cache_dir=str(tmp_path / "cache")).setup()
