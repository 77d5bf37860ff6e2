"""`--volumes FOLDER`: what of a recipe follows from the user's volumes, and what stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from volume_files import noise, write_nifti, write_volumes

from lightspan.cli.config.resolve import resolve
from lightspan.cli.config.user_volumes import DATA, with_volumes
from lightspan.cli.main import main
from lightspan.core.errors import UserError

RECIPE = "masked/mae_volumes"


def test_the_folder_replaces_the_data_and_the_networks_channels_follow(tmp_path: Path) -> None:
    for number in range(5):
        for name in ("t1", "t2"):
            write_nifti(tmp_path / "in" / f"s{number}_{name}.nii", noise(number))
    patterns = "data.init_args.modalities={t1: '{subject}_t1', t2: '{subject}_t2'}"
    before, after = resolve(RECIPE), with_volumes(RECIPE, (), tmp_path / "in", [patterns])
    data = after.config["data"]
    assert data["class_path"] == DATA
    given, kept = data["init_args"], before.config["data"]["init_args"]
    assert (given["folder"], given["size"], given["crops"]) == (str(tmp_path / "in"), kept["size"], kept["crops"])
    assert given["batch_size"] == 4
    assert "patients" not in given
    assert after.config["model"]["init_args"]["backbone"]["init_args"]["in_chans"] == 2
    assert after.about["title"] == f"{RECIPE} on the volumes of in"
    assert after.notes == [
        f"--volumes: 5 subjects in {tmp_path / 'in'}, of 2 modalities",
        "model.init_args.backbone.init_args.in_chans=2",
        "data.init_args.batch_size=4, since there are few volumes",
    ]
    callbacks = after.config["trainer"]["callbacks"]
    assert {"first_batch", "reconstructions"} <= callbacks.keys()
    assert "feature_pictures" not in callbacks


def test_one_subject_is_not_said_to_be_several(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "in", 1)
    assert with_volumes(RECIPE, (), folder, []).notes[0] == f"--volumes: 1 subject in {folder}, of one modality"


def test_a_grid_of_base_crops_is_kept(tmp_path: Path) -> None:
    found = with_volumes("contrastive/voco", (), write_volumes(tmp_path / "in", 5), []).config["data"]["init_args"]
    kept = resolve("contrastive/voco").config["data"]["init_args"]
    assert {key: found[key] for key in ("bases", "crops", "size")} == {
        key: kept[key] for key in ("bases", "crops", "size")
    }
    assert "patients" not in found


def test_slices_as_images_are_kept_and_every_part_learns_how_many_channels_there_are(tmp_path: Path) -> None:
    for number in range(5):
        for name in ("t1", "t2"):
            write_nifti(tmp_path / "in" / f"s{number}_{name}.nii", noise(number))
    patterns = "data.init_args.modalities={t1: '{subject}_t1', t2: '{subject}_t2'}"
    found = with_volumes("clustering/joint_2d_3d", (), tmp_path / "in", [patterns]).config
    kept = resolve("clustering/joint_2d_3d").config["data"]["init_args"]
    assert found["data"]["init_args"]["slices"] == kept["slices"]
    embedding = found["model"]["init_args"]["backbone"]["init_args"]["embedding"]
    assert embedding["init_args"]["encoder"]["init_args"]["in_chans"] == 2
    restorer = with_volumes("masked/models_genesis", (), tmp_path / "in", [patterns]).config["model"]["init_args"]
    assert restorer["in_chans"] == restorer["backbone"]["init_args"]["in_chans"] == 2


def test_train_and_validation_folders_are_taken_and_classes_bring_probes(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b"):
        write_volumes(tmp_path / "in" / place, 2)
    flags = ["data.init_args.modalities={volume: '{class}/**'}"]
    found = with_volumes(RECIPE, (), tmp_path / "in", flags).config
    assert found["data"]["init_args"]["val_folder"] == str(tmp_path / "in" / "val")
    assert "probes" in found["trainer"]["callbacks"]
    assert "probes" not in with_volumes(RECIPE, (), tmp_path / "in", []).config["trainer"]["callbacks"]


def test_classes_of_voxels_are_read_where_the_user_says_and_as_many_as_the_recipe_says(tmp_path: Path) -> None:
    recipe = "supervised/mhs_vm_volumes"
    for number in range(4):
        for name in ("t1", "t2", "seg"):
            write_nifti(tmp_path / "in" / "a" / f"s{number}_{name}.nii", noise(number))
    flags = ["data.init_args.modalities={t1: '{class}/{subject}_t1', t2: '{class}/{subject}_t2'}"]
    with pytest.raises(UserError, match="segmentation="):
        with_volumes(recipe, (), tmp_path / "in", flags)
    flags += ["data.init_args.segmentation='{class}/{subject}_seg'", "model.init_args.num_classes=5"]
    found = with_volumes(recipe, (), tmp_path / "in", flags).config
    assert found["model"]["init_args"]["num_classes"] == 5
    assert found["model"]["init_args"]["backbone"]["init_args"]["in_chans"] == 2
    assert found["data"]["init_args"]["segmentation"] == "{class}/{subject}_seg"


def test_recipes_of_other_data_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contrastive/simclr is a recipe for data of modality image"):
        with_volumes("contrastive/simclr", (), write_volumes(tmp_path / "in", 2), [])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        with_volumes(RECIPE, (), tmp_path / "none", [])
    assert main(["check", RECIPE, "--volumes", str(tmp_path / "in"), "--images", str(tmp_path), "--fast"]) == 2


def test_check_names_damaged_files_from_their_headers(tmp_path: Path, capsys: Any) -> None:
    folder = write_volumes(tmp_path / "in", 3)
    assert main(["check", RECIPE, "--volumes", str(folder), "--fast"]) == 0
    (folder / "s1.nii.gz").write_bytes(b"")
    assert main(["check", RECIPE, "--volumes", str(folder), "--fast"]) == 2
    assert "1 of 3 subjects cannot be read: s1.nii.gz: it is empty" in capsys.readouterr().err


@pytest.mark.runs
def test_one_line_trains_on_a_folder_and_draws_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(6):
        write_nifti(tmp_path / "in" / f"s{number}.nii.gz", np.pad(noise(number, (10, 12, 14)), 2), (2.0, 1, 1))
    given = [RECIPE, "--volumes", str(tmp_path / "in"), "data.init_args.spacing=1.5", "data.init_args.size=16"]
    given += ["trainer.max_steps=2", "trainer.accelerator=cpu", "data.init_args.num_workers=0"]
    given += ["trainer.log_every_n_steps=1"]
    assert main(["fit", *given, "--dry-run"]) == 0
    assert not (tmp_path / "cache" / "lightspan" / "volumes").exists()
    assert main(["fit", *given, "--run", str(tmp_path / "run")]) == 0
    for picture in ("first-batch.png", "reconstructions.png"):
        assert (tmp_path / "run" / "pictures" / picture).stat().st_size > 1000
    assert "report:" in capsys.readouterr().out
