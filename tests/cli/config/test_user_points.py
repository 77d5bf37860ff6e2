"""`--points FOLDER`: what of a recipe follows from the user's files, and what stays."""

from pathlib import Path
from typing import Any

import pytest
from point_files import bricks

from lightspan.cli.config.resolve import resolve
from lightspan.cli.config.user_points import DATA, with_points
from lightspan.cli.main import main
from lightspan.core.errors import UserError

RECIPE = "masked/point_mae"


def test_the_folder_replaces_the_data_and_keeps_its_points_and_changes(tmp_path: Path) -> None:
    before, after = resolve(RECIPE), with_points(RECIPE, (), bricks(tmp_path / "in", 5), [])
    data = after.config["data"]
    given, kept = data["init_args"], before.config["data"]["init_args"]
    assert data["class_path"] == DATA
    assert (given["folder"], given["points"], given["augment"]) == (
        str(tmp_path / "in"),
        kept["points"],
        kept["augment"],
    )
    assert given["batch_size"] == 4
    assert after.about["title"] == f"{RECIPE} on the points of in"
    assert after.notes == [
        f"--points: 5 files in {tmp_path / 'in'}",
        "data.init_args.batch_size=4, since there are few files",
        "trainer.callbacks.probes left out: probes need classes, and the folder has none",
    ]


def test_folders_of_classes_bring_probes_and_a_second_folder_validates(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b"):
        bricks(tmp_path / "in" / place, 2)
    found = with_points(RECIPE, (), tmp_path / "in", []).config
    assert found["data"]["init_args"]["val_folder"] == str(tmp_path / "in" / "val")
    assert "probes" in found["trainer"]["callbacks"]


def test_recipes_of_other_data_empty_folders_and_two_kinds_of_data_are_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="contrastive/simclr is a recipe for data of modality image"):
        with_points("contrastive/simclr", (), bricks(tmp_path / "in", 2), [])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        with_points(RECIPE, (), tmp_path / "none", [])
    assert main(["check", RECIPE, "--points", str(tmp_path / "in"), "--images", str(tmp_path), "--fast"]) == 2
    assert "--points" in capsys.readouterr().err


def test_check_names_damaged_files(tmp_path: Path, capsys: Any) -> None:
    folder = bricks(tmp_path / "in", 3)
    assert main(["check", RECIPE, "--points", str(folder), "--fast"]) == 0
    (folder / "bad.dat").write_text("0 Nothing\n")
    assert main(["check", RECIPE, "--points", str(folder), "--fast"]) == 2
    captured = capsys.readouterr()
    assert "bad.dat" in captured.out + captured.err


@pytest.mark.runs
def test_a_run_on_a_folder_draws_its_first_batch_and_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        bricks(tmp_path / "in" / name, 6)
    run = tmp_path / "run"
    given = [RECIPE, "--points", str(tmp_path / "in"), "trainer.max_steps=2", "trainer.accelerator=cpu"]
    small = ["data.init_args.points=64", "model.init_args.backbone.init_args.groups=8", "data.init_args.num_workers=0"]
    assert main(["fit", *given, *small, "--run", str(run)]) == 0
    assert (run / "pictures" / "first-batch.png").is_file()
    assert (run / "report" / "report.html").is_file()
