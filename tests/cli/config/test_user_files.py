"""`--points`, `--graphs` and `--recordings FOLDER`: what of a recipe follows from the user's files, and what stays."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from graph_files import rings
from point_files import bricks

from lightspan.cli.config.resolve import Resolved, resolve
from lightspan.cli.config.user_files import USER_FILES, UserFiles, with_files
from lightspan.cli.main import main
from lightspan.core.errors import UserError


def tones(folder: Path, count: int) -> Path:
    pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    from sound_files import write_recordings

    write_recordings(folder, {"": count})
    return folder


class Case(NamedTuple):
    """A recipe for files of a kind, how to write so many of them, and a damaged one's name and content."""

    own: UserFiles
    recipe: str
    write: Callable[[Path, int], Path]
    kept: str
    bad: tuple[str, str]
    flags: tuple[str, ...] = ()

    def over(self, folder: Path, flags: tuple[str, ...] = ()) -> Resolved:
        return with_files(self.own, self.recipe, (), folder, list(flags))


OF = {own.option: own for own in USER_FILES}
CASES = [
    Case(
        *(OF["--points"], "masked/point_mae", bricks, "augment", ("bad.dat", "0 Nothing\n")),
        ("data.init_args.points=64", "model.init_args.backbone.init_args.groups=8"),
    ),
    Case(
        *(OF["--graphs"], "masked/attribute_masking", rings, "batch_size", ("bad.json", "{")),
        ("model.init_args.backbone.init_args.width=8",),
    ),
    Case(
        *(OF["--recordings"], "masked/tera", tones, "batch_size", ("bad.wav", "")),
        ("data.init_args.seconds=0.3", "data.init_args.batch_size=4"),
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.own.option)


@every_case
def test_the_folder_replaces_the_data_and_keeps_what_still_has_a_meaning(case: Case, tmp_path: Path) -> None:
    before, after = resolve(case.recipe), case.over(case.write(tmp_path / "in", 5))
    data, kept = after.config["data"], before.config["data"]["init_args"]
    assert (data["class_path"], data["init_args"]["folder"]) == (case.own.data, str(tmp_path / "in"))
    assert data["init_args"]["batch_size"] == 4 < kept["batch_size"]
    assert after.config["model"] == before.config["model"]
    assert after.about["title"] == f"{case.recipe} on the {case.own.option.removeprefix('--')} of in"
    assert after.notes[:2] == [
        f"{case.own.option}: 5 {case.own.name} in {tmp_path / 'in'}",
        f"data.init_args.batch_size=4, since there are few {case.own.name}",
    ]
    many = case.over(case.write(tmp_path / "many", 100)).config["data"]["init_args"]
    assert many[case.kept] == kept[case.kept]


def test_a_file_of_molecules_may_fill_any_batch(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("C\nCC\n")
    case = CASES[1]
    before = resolve(case.recipe).config["data"]["init_args"]["batch_size"]
    assert case.over(tmp_path).config["data"]["init_args"]["batch_size"] == before


@every_case
def test_folders_of_classes_bring_probes_and_a_second_folder_validates(case: Case, tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b"):
        case.write(tmp_path / "in" / place, 2)
    found = case.over(tmp_path / "in").config
    assert found["data"]["init_args"]["val_folder"] == str(tmp_path / "in" / "val")
    assert "probes" in found["trainer"]["callbacks"]
    without = case.over(case.write(tmp_path / "flat", 4))
    assert "probes" not in without.config["trainer"]["callbacks"]


@every_case
def test_recipes_of_other_data_empty_folders_and_two_kinds_of_data_are_refused(
    case: Case, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(UserError, match="contrastive/simclr is a recipe for data of modality image"):
        case._replace(recipe="contrastive/simclr").over(case.write(tmp_path / "in", 2))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        case.over(tmp_path / "none")
    given = [case.recipe, case.own.option, str(tmp_path / "in"), "--images", str(tmp_path), "--fast"]
    assert main(["check", *given]) == 2
    assert case.own.option in capsys.readouterr().err


@every_case
def test_check_names_damaged_files(case: Case, tmp_path: Path, capsys: Any) -> None:
    check = partial(main, ["check", case.recipe, case.own.option, str(case.write(tmp_path / "in", 3)), "--fast"])
    assert check() == 0
    name, content = case.bad
    (tmp_path / "in" / name).write_text(content)
    assert check() == 2
    captured = capsys.readouterr()
    assert f"1 of 4 {case.own.name} cannot be read: {name} (" in captured.out + captured.err


def test_check_counts_a_file_of_many_damaged_molecules_as_one(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("rdkit")
    (tmp_path / "a.smi").write_text("C\n" + "C(\n" * 9)
    assert main(["check", "masked/attribute_masking", "--graphs", str(tmp_path), "--fast"]) == 2
    said = "".join(capsys.readouterr())
    assert "1 of 1 files cannot be read: a.smi row 2 (" in said
    assert "and 4 more" in said


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.init_args.kind=element", "AttributeMasking reads the kinds of nodes, and no node in"),
        ("data.init_args.numbers=[mass]", "numbers asks for mass, and no node in"),
    ],
)
def test_check_refuses_attributes_that_no_node_has(flag: str, message: str, tmp_path: Path, capsys: Any) -> None:
    given = ["masked/attribute_masking", "--graphs", str(rings(tmp_path / "in", 3)), "--fast"]
    assert main(["check", *given]) == 0
    assert main(["check", *given, flag]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert f"its nodes have id, kind; set {flag.partition('=')[0]} to" in said


@pytest.mark.runs
@every_case
def test_a_run_on_a_folder_draws_its_first_batch_and_ends_with_a_report(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        case.write(tmp_path / "in" / name, 6)
    run = tmp_path / "run"
    given = [case.recipe, case.own.option, str(tmp_path / "in"), "trainer.max_steps=2", "trainer.accelerator=cpu"]
    assert main(["fit", *given, *case.flags, "data.init_args.num_workers=0", "--run", str(run)]) == 0
    assert (run / "pictures" / "first-batch.png").is_file()
    assert (run / "report" / "report.html").is_file()
