"""`--table FILE`: what of a recipe follows from the user's rows, and what stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspan.cli.commands import intrinsic_dimension
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.user_tables import with_table
from lightspan.cli.main import main
from lightspan.core.errors import UserError

REGRESSION, CLASSIFICATION = "supervised/table_regression", "supervised/table_classification"
QUIET = ["trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.logger=null", "trainer.callbacks.progress=null"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [f"{number},{number % 7},{'abc'[number % 3]},{3 * number}" for number in range(60)]
    (tmp_path / "rows.csv").write_text("id,x,kind,price\n" + "\n".join(rows) + "\n")
    return tmp_path / "rows.csv"


def model(resolved: Resolved) -> dict[str, Any]:
    settings: dict[str, Any] = resolved.config["model"]["init_args"]
    return settings


def test_widths_classes_and_moments_follow_from_the_rows_and_the_flags(file: Path) -> None:
    numbers = with_table(REGRESSION, (), file, "price", ["data.init_args.time=id"])
    assert model(numbers)["backbone"]["init_args"] == {"in_shape": [1, 1, 4], "hidden": [64, 64]}
    trained = 3 * np.arange(42)  # the last 12 test, the 6 before them validate
    assert model(numbers)["target_mean"] == pytest.approx(trained.mean())
    assert model(numbers)["target_deviation"] == pytest.approx(trained.std())
    assert numbers.config["data"]["init_args"]["batch_size"] == 32  # 64 rows are not there
    classes = with_table(CLASSIFICATION, (), file, "kind", ["data.init_args.without=[id]"])
    assert model(classes)["num_classes"] == 3
    assert model(classes)["backbone"]["init_args"]["in_shape"] == [1, 1, 2]
    assert classes.about["title"] == f"{CLASSIFICATION} on the rows of rows.csv"
    mixed = with_table("contrastive/supremix", (), file, "price", ["model.init_args.bin_width=3"])
    assert model(mixed)["backbone"]["init_args"]["in_shape"] == [1, 1, 5]
    assert mixed.config["data"]["init_args"]["views"]["class_path"].endswith("RowViews")


def test_a_target_that_is_one_number_still_has_a_unit(file: Path) -> None:
    file.write_text("x,price\n" + "".join(f"{number},1000000.1\n" for number in range(10)))
    assert model(with_table(REGRESSION, (), file, "price", []))["target_deviation"] == 1


def test_an_overlay_reaches_the_rows_and_a_flag_wins(file: Path) -> None:
    overlay = file.parent / "mine.yaml"
    overlay.write_text("data: {init_args: {without: [id], categories: index, batch_size: 8}}\n")
    found = with_table(REGRESSION, (str(overlay),), file, "price", [])
    assert model(found)["backbone"]["init_args"]["in_shape"] == [1, 1, 2]
    assert found.config["data"]["init_args"]["batch_size"] == 8
    found = with_table(REGRESSION, (str(overlay),), file, "price", ["data.init_args.categories=one_hot"])
    assert model(found)["backbone"]["init_args"]["in_shape"] == [1, 1, 4]


def test_what_does_not_fit_is_refused_by_name(file: Path) -> None:
    for recipe, target, flags, message in (
        ("contrastive/simclr", "price", [], "contrastive/simclr is a recipe for data of modality image"),
        (REGRESSION, None, [], "name it with --target COLUMN"),
        (REGRESSION, "kind", [], "target=kind has text"),
        (REGRESSION, "prize", [], "did you mean 'price'"),
        (REGRESSION, "price", ["data.init_args.missing=imput"], "data.init_args.missing"),
        (REGRESSION, "price", ["data.init_args.max_categories=x"], "data.init_args.max_categories"),
        (REGRESSION, "price", ["data.init_args.max_categories=2"], "'kind' has 3 categories"),
    ):
        with pytest.raises(UserError, match=message):
            with_table(recipe, (), file, target, flags)


def test_options_that_contradict_one_another_are_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--target", "price"], "--target is a column of --table"),
        (["--table", str(file), "--images", str(file.parent)], "--images and --table each"),
        (["--table", str(file.parent / "none.csv"), "--target", "price"], "none.csv cannot be read as a table"),
    ):
        assert main(["check", REGRESSION, "--fast", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.runs
@pytest.mark.smoke
def test_one_line_trains_on_rows_of_ones_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, target, figure in (
        (REGRESSION, "price", "val/mean_absolute_error"),
        (CLASSIFICATION, "kind", "val/accuracy"),
    ):
        words = [recipe, "--table", str(file), "--target", target, "--run", str(file.parent / target), *QUIET]
        assert main(["fit", *words]) == 0
        said = capsys.readouterr()
        assert "--table: 60 rows" in said.err
        assert "42 training, 6 validation and 12 test rows" in said.out
        assert figure.replace("/", "_") in (file.parent / target / "summary.json").read_text()


def test_intrinsic_dimension_searches_on_the_rows(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched: list[Resolved] = []

    def references_of(resolved: Resolved, settings: Any) -> None:
        searched.append(resolved)
        raise UserError("far enough")

    monkeypatch.setattr(intrinsic_dimension, "references_of", references_of)
    asked = ["--table", str(file), "--target", "price", "--grid", "0,10", "--out", str(tmp_path / "d90")]
    assert main(["intrinsic-dimension", REGRESSION, *asked]) == 2
    assert "far enough" in capsys.readouterr().err
    assert searched[0].config["data"]["init_args"]["path"] == str(file)
    assert model(searched[0])["backbone"]["init_args"]["in_shape"] == [1, 1, 5]
