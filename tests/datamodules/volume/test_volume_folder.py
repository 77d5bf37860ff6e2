"""A folder of volumes as batches: crops, masks of what is there, the split, the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from volume_files import noise, write_nifti, write_volumes

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.slices import ANATOMY
from lightspan.datamodules.volume.augment import VolumeAugmentation
from lightspan.datamodules.volume.batch import VolumeBatch, VolumeViewsBatch
from lightspan.datamodules.volume.data import VolumeSets, cropped, overlaps
from lightspan.datamodules.volume.folder import VolumeFolder
from lightspan.datamodules.volume.intensity import IntensityWindow
from lightspan.datamodules.volume.phantoms import ORGANS, Phantoms


def opened(folder: Path, **settings: Any) -> VolumeFolder:
    data = VolumeFolder(
        str(folder), **{"cache_dir": str(folder.parent / "cache"), "size": 4, "batch_size": 2} | settings
    )
    data.setup()
    return data


def batches(data: VolumeSets, count: int) -> list[dict[str, Any]]:
    loader, found = data.train_dataloader(), []
    while len(found) < count:
        found += list(loader)
    return found[:count]


def test_a_size_may_be_a_list_and_has_one_number_or_three() -> None:
    assert Phantoms(patients=2, size=[4, 5, 6]).size == Phantoms(patients=2, size=(4, 5, 6)).size == (4, 5, 6)  # type: ignore[arg-type]
    assert Phantoms(patients=2, size=4).size == (4, 4, 4)
    with pytest.raises(UserError, match=r"size=\[4, 5\]"):
        Phantoms(patients=2, size=[4, 5])  # type: ignore[arg-type]


def test_batches_are_as_documented(tmp_path: Path) -> None:
    data = opened(write_volumes(tmp_path / "in", 6), intensity=IntensityWindow(0, 1000))
    (batch, *_), held = batches(data, 2), next(iter(data.val_dataloader()))
    for one in (batch, held):
        require_declared(one, data.batch_type, "VolumeFolder")
        for row, index in enumerate(one["index"].tolist()):
            source = data.train if one is batch else data.val
            whole = noise(source.numbers[index]) / np.float32(1000)
            crop = cropped(whole, one["corner"][row].tolist(), (4, 4, 4), 0)
            assert torch.allclose(one["volume"][row, 0], torch.from_numpy(crop), atol=5e-4)
    assert held["corner"].tolist() == [[1, 1, 0]] * len(held["corner"])
    assert batch["present"].all()
    assert batch["spacing"].tolist() == [[1, 1, 1]] * 2
    assert not data.labelled


def test_crops_follow_from_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "in", 7)
    augment = VolumeAugmentation(flip=(0.5, 0.5, 0.5), elastic=1.0)
    straight = batches(opened(folder, crops=2, augment=augment), 6)
    again = opened(folder, crops=2, augment=augment, num_workers=1)
    loader = again.train_dataloader()
    first = [batch for _, batch in zip(range(2), loader, strict=False)]
    resumed = opened(folder, crops=2, augment=augment).train_dataloader()
    state = loader.state_dict()
    assert state["samples"] == 4
    resumed.load_state_dict(state)
    rest = [*resumed, *resumed]
    for one, other in zip(straight, [*first, *rest], strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one["views"], other["views"], strict=True))
        assert all(torch.equal(one[name], other[name]) for name in ("corner", "drawn", "seed", "index"))
    assert len({str(batch["corner"]) for batch in straight}) > 1
    other = opened(write_volumes(tmp_path / "other", 8), crops=2, augment=augment).train_dataloader()
    with pytest.raises(UserError, match="length"):
        other.load_state_dict(state)


def test_a_crop_beyond_its_volume_is_zero_and_without_labels(tmp_path: Path) -> None:
    for number in range(3):
        write_nifti(tmp_path / "in" / f"s{number}.nii", noise(number, (2, 6, 6)))
        write_nifti(tmp_path / "in" / f"s{number}_seg.nii", np.full((2, 6, 6), number, np.uint8))
    data = opened(tmp_path / "in", modalities={"ct": "{subject}"}, segmentation="{subject}_seg")
    batch = data.train_dataloader().__iter__().__next__()
    assert batch["corner"][:, 0].tolist() == [-1, -1]
    assert not batch["volume"][:, :, [0, 3]].any()
    assert (batch["segmentation"][:, [0, 3]] == -1).all()
    numbers = torch.from_numpy(data.train.numbers)[batch["index"]]
    assert (batch["segmentation"][:, 1:3] == numbers[:, None, None, None]).all()


def test_a_missing_modality_is_zero_and_a_missing_segmentation_unknown(tmp_path: Path, capsys: Any) -> None:
    for number in range(4):
        for name in ("t1", "t2", "seg")[: 1 if number == 2 else 3]:
            write_nifti(tmp_path / "in" / f"s{number}" / f"{name}.nii.gz", noise(number, (4, 4, 4)))
    patterns = {name: f"{{subject}}/{name}" for name in ("t1", "t2")}
    data = opened(tmp_path / "in", modalities=patterns, segmentation="{subject}/seg", val_share=0.25)
    assert "1 of 4 subjects have no t2" in capsys.readouterr().out
    parts = [(data.bank, number) for number in range(len(data.bank))] + [(data.val, 0)]
    for samples, number in parts:
        sample = samples.sample(number, 0)
        lacks = int(samples.numbers[number]) == 2
        assert sample["present"].tolist() == [True, not lacks]
        assert bool(sample["volume"][1].any()) is not lacks
        assert bool((sample["segmentation"] == -1).all()) is lacks


def test_sessions_of_a_subject_are_on_one_side_and_classes_count(tmp_path: Path) -> None:
    for group in ("sick", "well"):
        for number in range(4):
            for session in (1, 2):
                write_nifti(tmp_path / "in" / group / f"{group}{number}_{session}.nii", noise(number, (4, 4, 4)))
    data = opened(tmp_path / "in", modalities={"mr": "{class}/{subject}_{session}"}, val_share=0.25)
    assert (len(data.train), len(data.val)) == (12, 4)
    subjects = data.train.archive.packs[0].subjects
    inside, held = ({subjects[number].subject for number in part.numbers} for part in (data.train, data.val))
    assert not inside & held
    assert data.classes == ("sick", "well")
    assert data.labelled
    assert sorted(data.val.labels().tolist()) == [0, 0, 1, 1]
    write_nifti(tmp_path / "val" / "good" / "x_1.nii", noise(0, (4, 4, 4)))
    with pytest.raises(UserError, match="has good, which is no class"):
        opened(tmp_path / "in", val_folder=str(tmp_path / "val"), modalities={"mr": "{class}/{subject}_{session}"})


def test_damage_is_refused_or_left_out_by_name(tmp_path: Path, capsys: Any) -> None:
    folder = write_volumes(tmp_path / "in", 4)
    (folder / "s1.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 4 subjects cannot be read:\n  .*s1.nii.gz: it is empty\nRepair"):
        opened(folder)
    data = opened(folder, skip_damaged=True)
    assert "left out" in capsys.readouterr().out
    assert sorted([*data.train.numbers, *data.val.numbers]) == [0, 2, 3]
    for number in range(4):
        (folder / f"s{number}.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 4 subjects can be read"):
        opened(folder, skip_damaged=True)
    one = tmp_path / "labels"
    write_nifti(one / "a.nii", noise(0))
    write_nifti(one / "a_seg.nii", noise(0, (6, 7, 6)))
    with pytest.raises(UserError, match=r"a_seg.nii: it is not on the grid of a.nii, 6 x 7 x 6 voxels"):
        opened(one, modalities={"ct": "{subject}"}, segmentation="{subject}_seg")
    write_nifti(one / "a_seg.nii", noise(0) / 3)
    with pytest.raises(UserError, match=r"a_seg.nii: it holds .*, and labels are whole numbers"):
        opened(one, modalities={"ct": "{subject}"}, segmentation="{subject}_seg")


def test_constant_and_unfinished_volumes_are_finite(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in" / "a.nii", np.full((5, 5, 5), 7.0, np.float32))
    holes = noise(0).astype(np.float32)
    holes[0], holes[1] = np.nan, np.inf
    write_nifti(tmp_path / "in" / "b.nii", holes)
    data = opened(tmp_path / "in", batch_size=1)
    for samples in (data.bank, data.val):
        sample = samples.sample(0, 0)["volume"]
        assert sample.isfinite().all()
        assert bool(sample.any()) is bool(samples.numbers[0] == 1)


def test_other_spacings_are_resampled_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_nifti(tmp_path / "in" / f"s{number}.nii", noise(number, (4, 8, 8)), (2.0, 1, 1))
    data = opened(tmp_path / "in", spacing=2.0)
    assert data.train.archive.read(0).values.shape == (1, 4, 4, 4)
    assert data.bank.sample(0, 0)["spacing"].tolist() == [2, 2, 2]
    monkeypatch.setattr("lightspan.datamodules.volume.packed._write", lambda *_: pytest.fail("read again"))
    again = opened(tmp_path / "in", spacing=(2.0, 2.0, 2.0))
    assert torch.equal(again.bank.sample(0, 0)["volume"], data.bank.sample(0, 0)["volume"])
    with pytest.raises(UserError, match="cache_gib"):
        opened(tmp_path / "in", cache_gib=1e-8)


def test_overlaps_are_shares_of_voxels_that_sum_to_one_over_a_grid() -> None:
    size, bases = (2, 4, 3), np.array([[0, h, w] for h in (0, 4, 8) for w in (0, 3)])
    crops = np.array([[0, h, w] for h in range(9) for w in range(4)])
    shares = overlaps(crops, bases, size)
    for crop, row in zip(crops, shares, strict=True):
        inside = np.zeros((2, 12, 6), bool)
        inside[tuple(slice(at, at + side) for at, side in zip(crop, size, strict=True))] = True
        counted = [inside[:, h : h + 4, w : w + 3].mean() for _, h, w in bases]
        np.testing.assert_allclose(row, counted, atol=1e-12)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert (shares > 0).sum(axis=1).max() == 4
    np.testing.assert_array_equal(overlaps(bases, bases, size), np.eye(6))


def test_base_crops_are_the_cells_of_a_grid_in_the_middle_and_come_before_the_others(tmp_path: Path) -> None:
    data = opened(write_volumes(tmp_path / "in", 6), bases=(1, 1, 2), size=(4, 5, 2), crops=3, spacing=1)
    (batch, *_) = batches(data, 1)
    require_declared(batch, data.batch_type, "VolumeFolder")
    assert batch["overlap"].shape == (2, 3, 2)
    assert batch["corner"][:, :2].tolist() == [[[1, 1, 0], [1, 1, 2]]] * 2  # of volumes of 6 x 7 x 5
    assert (batch["corner"][:, 2:, :2] == 1).all()
    torch.testing.assert_close(batch["overlap"].sum(dim=2), torch.ones(2, 3))
    both = torch.cat(batch["views"][:2], dim=4)
    for row in range(2):
        for crop, corner in zip(batch["views"][2:], batch["corner"][row, 2:].tolist(), strict=True):
            assert torch.equal(crop[row], both[row, ..., corner[2] : corner[2] + 2])
    for samples in (data.bank, data.val):
        assert "overlap" not in samples.sample(0, 0)


def test_a_crop_that_lies_outside_of_its_volume_is_empty_on_any_side() -> None:
    values = np.ones((1, 4, 5, 3), np.float32)
    for at in range(-9, 10):
        for axis, length in enumerate((4, 5, 3)):
            corner = [0, 0, 0]
            corner[axis] = at
            crop = cropped(values, corner, (2, 2, 2), -1)
            inside = sum(0 <= place < length for place in range(at, at + 2))
            assert crop.shape == (1, 2, 2, 2)
            assert (crop == 1).sum() == 4 * inside


def test_a_grid_that_is_larger_than_its_volume_has_empty_cells(tmp_path: Path) -> None:
    away = VolumeFolder(str(tmp_path / "away"), size=4, bases=(1, 4, 5), crops=2)
    batch: Any = away.stand_in()
    assert [tuple(view.shape) for view in batch["views"]] == 22 * [(2, 1, 4, 4, 4)]
    own = VolumeFolder(str(write_volumes(tmp_path / "own", 6, (4, 5, 6))), size=4, bases=(2, 4, 5), crops=1)
    own.setup()
    assert len(own.train.sample(0, 3)["views"]) == 41


def test_a_grid_is_laid_over_the_body_whatever_its_size_and_place(tmp_path: Path) -> None:
    patterns = {"modalities": {"ct": "{subject}"}, "segmentation": "{subject}_seg"}
    for number, (factor, at) in enumerate([(1, 1), (2, 3), (1, 0), (3, 2)]):
        body = np.arange(1, 5, dtype=np.int16).reshape(1, 2, 2).repeat(2 * factor, 0).repeat(2 * factor, 1)
        body = body.repeat(2 * factor, 2)
        around = [(at, 4), (4, at), (at, at)]
        write_nifti(tmp_path / "in" / f"s{number}.nii", np.pad(100 * body + 500, around))
        write_nifti(tmp_path / "in" / f"s{number}_seg.nii", np.pad(body, around))
    data = opened(
        tmp_path / "in", **patterns, bases=(1, 2, 2), size=2, crops=1, intensity=IntensityWindow(0, 1000), val_share=0.3
    )
    for number in range(4):
        volume = data.train.archive.read(number)
        assert volume.values.shape == (1, 2, 4, 4)
        expected = np.arange(1, 5).reshape(1, 2, 2).repeat(2, 0).repeat(2, 1).repeat(2, 2)
        np.testing.assert_array_equal(volume.segmentation, expected)
        np.testing.assert_allclose(volume.values[0, :, ::3, ::3], (expected / 10 + 0.5)[:, ::3, ::3], atol=1e-3)
    # The body of the first begins at (1, 4, 1); a new voxel is an old one there, and half as many fit the second.
    for number, middle in ((0, (1, 4, 1)), (1, (3.5, 4.5, 3.5))):
        affine = data.train.archive.read(number).affine
        np.testing.assert_allclose(affine[:3, 3][::-1], middle)
    write_nifti(tmp_path / "dark" / "a.nii", np.full((3, 3, 3), 7.0, np.float32))
    write_nifti(tmp_path / "dark" / "b.nii", np.zeros((3, 3, 3), np.float32))
    dark = opened(tmp_path / "dark", bases=(1, 2, 2), size=2, crops=1, batch_size=1)
    assert not dark.train.archive.read(0).values.any()


def test_no_file_stays_open_behind_a_sample(tmp_path: Path) -> None:
    data = opened(write_volumes(tmp_path / "in", 3))
    samples = [data.bank.sample(number, 0) for number in range(len(data.bank))]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), len(samples)


def test_settings_out_of_range_are_named() -> None:
    for settings, said in (
        ({"size": 0}, "size=0"),
        ({"size": (1, 2, 0)}, "size="),
        ({"crops": 0}, "crops=0"),
        ({"bases": (1, 2, 2)}, "crops=None"),
        ({"bases": (1, 0, 2), "crops": 1}, r"bases=\[1, 0, 2\]"),
        ({"size": 10**5}, "size=100000"),
        ({"crops": 10**9}, "crops=1000000000"),
        ({"crops": 1, "bases": (10**5, 10**5, 10**5)}, r"bases=\[100000"),
        ({"val_share": 1}, "val_share=1"),
        ({"spacing": 0}, "spacing=0"),
        ({"cache_gib": 0}, "cache_gib=0"),
        ({"size": (4, 4, 6), "augment": VolumeAugmentation(turn=0.5)}, "augment.turn=0.5"),
    ):
        with pytest.raises(UserError, match=said):
            VolumeFolder(".", **settings)


def test_a_folder_that_is_not_here_has_a_batch_of_the_right_shapes_for_plans(tmp_path: Path) -> None:
    modalities = {"t1": "{subject}_t1", "t2": "{subject}_t2"}
    for settings in (
        {}, {"crops": 2}, {"augment": VolumeAugmentation(gain=0.1)}, {"segmentation": "{subject}_seg"},
        {"crops": 1, "bases": (1, 2, 2)},
        {"modalities": modalities, "crops": 1, "augment": VolumeAugmentation(flip=(0.5, 0, 0))},
    ):  # fmt: skip
        away = VolumeFolder(str(tmp_path / "away"), size=(2, 4, 6), **settings)
        batch: Any = away.stand_in()
        assert away.batch_type is (VolumeViewsBatch if "crops" in settings else VolumeBatch)
        require_declared(batch, away.batch_type, "VolumeFolder")
        volumes = batch["views"] if "crops" in settings else [batch["volume"]]
        assert {volume.shape for volume in volumes} == {(2, len(settings.get("modalities", "1")), 2, 4, 6)}
        assert ("segmentation" in batch) == ("segmentation" in settings)
        finished = away.on_after_batch_transfer(batch, 0)
        assert ("parameters" in finished) == ("augment" in settings)
    assert VolumeFolder(str(tmp_path)).stand_in() is None
    assert VolumeFolder(str(tmp_path)).batch_type is None


def test_one_subject_leaves_none_to_validate_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable volumes are left for val: 1 for train, 0 for val"):
        opened(write_volumes(tmp_path / "in", 1))


def test_phantoms_are_one_body_in_contrasts_of_which_every_second_has_no_lesion() -> None:
    settings: dict[str, Any] = {"patients": 4, "cuts": 16, "side": 24, "noise": 0.0, "val_size": 1, "diseased": 1.0}
    one, three = (Phantoms(contrasts=contrasts, **settings).find() for contrasts in (1, 3))
    assert one.content != three.content
    greys, lesions = [grey for grey, *_ in ANATOMY.values()], 0
    for number in range(4):
        plain, volume = one.archive.read(number), three.archive.read(number)
        assert volume.values.shape == (3, 16, 24, 24)
        assert volume.present.tolist() == [True] * 3
        assert np.array_equal(volume.values[0], plain.values[0])
        assert np.array_equal(volume.segmentation, plain.segmentation)
        first, second, third = volume.values.astype(np.float32)
        for contrast, image in enumerate((first, second, third)):
            for organ in (ORGANS.index("liver"), ORGANS.index("muscle")):
                expected = greys[(organ - 1 + contrast) % len(greys)]
                assert np.median(image[volume.segmentation == organ]) == pytest.approx(expected, abs=0.05)
        # What is more than the greys of patients differ is a vessel, or a lesion, which the second contrast lacks.
        own, next_one, shifted = (np.array([0, *greys, *greys[:2]])[volume.segmentation + at] for at in range(3))
        inside = volume.segmentation > 0
        clear = inside & (np.abs(first - own) > 0.25) & (first > 0.02) & (third > 0.02) & (third < 0.98)
        np.testing.assert_allclose((third - shifted)[clear], (first - own)[clear], atol=2e-3)
        lesions += int((inside & (np.abs(first - own) > 0.25) & (np.abs(second - next_one) < 1e-3)).sum())
    assert lesions
    with pytest.raises(UserError, match="contrasts=0"):
        Phantoms(contrasts=0)


def test_phantoms_have_each_organ_where_it_belongs() -> None:
    data = Phantoms(patients=4, cuts=16, side=24, size=(16, 24, 24), batch_size=2, noise=0.0, val_size=1)
    data.setup()
    (batch,) = batches(data, 1)
    require_declared(batch, data.batch_type, "Phantoms")
    organ = {name: number for number, name in enumerate(ORGANS)}
    for sample in (data.bank.sample(number, 0) for number in range(3)):
        labels = sample["segmentation"]

        def middle(name: str, labels: torch.Tensor = labels) -> torch.Tensor:
            return (labels == organ[name]).nonzero().float().mean(dim=0)

        assert middle("right lung")[0] > middle("right kidney")[0]  # D towards the head
        assert middle("heart")[1] > middle("spine")[1]  # H towards the front
        assert middle("right kidney")[2] > middle("left kidney")[2]  # W towards the right
        assert sample["volume"][0][labels == organ["outside"]].mean() < 0.05 < sample["volume"][0].mean()
        assert sample["spacing"].tolist() == pytest.approx([30, 400 / 24, 400 / 24])
