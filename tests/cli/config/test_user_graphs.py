"""`--graphs FOLDER`: what of a recipe follows from the user's files, and what stays."""

from pathlib import Path
from typing import Any

import pytest
from graph_files import rings

from lightspan.cli.config.resolve import resolve
from lightspan.cli.config.user_graphs import DATA, with_graphs
from lightspan.cli.main import main
from lightspan.core.errors import UserError

RECIPE = "masked/attribute_masking"


def test_the_folder_replaces_the_data_and_keeps_its_batch_unless_there_are_few_graphs(tmp_path: Path) -> None:
    before, after = resolve(RECIPE), with_graphs(RECIPE, (), rings(tmp_path / "in", 5), [])
    data = after.config["data"]
    assert data["class_path"] == DATA
    assert data["init_args"]["folder"] == str(tmp_path / "in")
    assert data["init_args"]["batch_size"] == 4
    assert after.config["model"] == before.config["model"]
    assert after.notes == [
        f"--graphs: 5 files in {tmp_path / 'in'}",
        "data.init_args.batch_size=4, since there are few files",
    ]
    (tmp_path / "mol").mkdir()
    (tmp_path / "mol" / "a.smi").write_text("C\nCC\n")
    kept = with_graphs(RECIPE, (), tmp_path / "mol", []).config["data"]["init_args"]["batch_size"]
    assert kept == before.config["data"]["init_args"]["batch_size"]


def test_folders_of_classes_bring_probes_and_a_second_folder_validates(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b"):
        rings(tmp_path / "in" / place, 2)
    found = with_graphs(RECIPE, (), tmp_path / "in", []).config
    assert found["data"]["init_args"]["val_folder"] == str(tmp_path / "in" / "val")
    assert "probes" in found["trainer"]["callbacks"]


def test_recipes_of_other_data_empty_folders_and_two_kinds_of_data_are_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="contrastive/simclr is a recipe for data of modality image"):
        with_graphs("contrastive/simclr", (), rings(tmp_path / "in", 2), [])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        with_graphs(RECIPE, (), tmp_path / "none", [])
    assert main(["check", RECIPE, "--graphs", str(tmp_path / "in"), "--points", str(tmp_path), "--fast"]) == 2
    assert "--graphs" in capsys.readouterr().err


def test_check_names_damaged_files(tmp_path: Path, capsys: Any) -> None:
    folder = rings(tmp_path / "in", 3)
    assert main(["check", RECIPE, "--graphs", str(folder), "--fast"]) == 0
    (folder / "bad.json").write_text("{")
    assert main(["check", RECIPE, "--graphs", str(folder), "--fast"]) == 2
    captured = capsys.readouterr()
    assert "bad.json" in captured.out + captured.err


@pytest.mark.runs
def test_a_run_on_a_folder_draws_its_first_batch_and_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        rings(tmp_path / "in" / name, 6)
    run = tmp_path / "run"
    given = [RECIPE, "--graphs", str(tmp_path / "in"), "trainer.max_steps=2", "trainer.accelerator=cpu"]
    small = ["model.init_args.backbone.init_args.width=8", "data.init_args.num_workers=0"]
    assert main(["fit", *given, *small, "--run", str(run)]) == 0
    assert (run / "pictures" / "first-batch.png").is_file()
    assert (run / "report" / "report.html").is_file()
