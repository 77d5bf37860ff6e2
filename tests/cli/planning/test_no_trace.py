"""A dry run and a plan change no file outside a temporary folder that is gone afterwards, whatever a recipe says."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from audited import writes_only_below
from picture_files import write_pictures
from shard_files import write_shard
from shipped_recipes import CONFIGS, RECIPES

from lightspan.cli.config.check import kind_of
from lightspan.cli.config.tree import dump
from lightspan.cli.main import main

BASE = "nothing beyond the base install"


def one_of_each_family() -> dict[str, str]:
    """Family -> the first of its recipes that trains and needs nothing else."""
    found: dict[str, str] = {}
    for name, recipe in RECIPES.items():
        if recipe.about.get("needs") == BASE and kind_of(set(CONFIGS[name])) == "model":
            found.setdefault(name.split("/")[0], name)
    return found


def everything_beside(scratch: Path) -> dict[Path, tuple[int, int]]:
    beside = (path for path in scratch.parent.rglob("*") if path != scratch)
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in beside}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files; home, cache and current folder are beside it, and stay as they are."""
    for name in ("scratch", "home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "scratch"
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.sweep
def test_a_dry_run_of_a_recipe_of_each_family_leaves_no_trace(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families = one_of_each_family()
    assert len(families) >= 8
    before = everything_beside(scratch)
    for name in families.values():
        with writes_only_below(scratch):
            assert main(["fit", name, "--dry-run"]) == 0, capsys.readouterr().err
        assert "Nothing was written." in capsys.readouterr().out
    assert everything_beside(scratch) == before


SHARDS = "lightspan.datamodules.shards.stream.Shards"
FOLDER = "lightspan.datamodules.image.folder.ImageFolder"


def recipe(file: str, class_path: str, **settings: object) -> str:
    """A classifier of pictures of 3 x 8 x 8 of these data."""
    backbone = {"class_path": "lightspan.backbones.vision.MLP", "init_args": {"in_shape": [3, 8, 8], "hidden": [8]}}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    model = {
        "class_path": "lightspan.methods.supervised.classifier.Classifier",
        "init_args": {"backbone": backbone, "num_classes": 2, "optimizer": optimizer},
    }
    data = {"class_path": class_path, "init_args": {"batch_size": 4, **settings}}
    Path(file).write_text(dump({"base": "defaults", "data": data, "model": model}))
    return file


@pytest.mark.sweep
@pytest.mark.parametrize("verb", [["plan"], ["fit", "--dry-run"]])
def test_data_of_ones_own_leave_no_trace_wherever_the_command_line_has_them_kept(
    verb: list[str], scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(Path("in"), {"a": 6, "b": 6})
    write_shard(Path("0.tar"), range(2), width=8, index=False)
    thesis = Path("proj/thesis")
    thesis.mkdir(parents=True)
    (thesis / "about.json").write_text("{}")
    os.utime(thesis, (1, 1))
    own = recipe("own.yaml", FOLDER, folder="in", size=8, cache_gib=3e-6)
    shards = recipe("shards.yaml", SHARDS, shards=["0.tar"], image_size=8, fields={"image": "png", "label": "cls"})
    lines = [
        [own],
        [own, "data.init_args.cache_dir=proj"],
        [own, "trainer.default_root_dir=.", "trainer.callbacks.finite.init_args.folder=kept"],
        [shards, "data.init_args.batch_size=2"],
    ]
    hostile = recipe(
        "hostile.yaml", FOLDER, folder="in", size=8, cache_gib=3e-6, cache_dir=str(Path("proj").absolute())
    )
    before = everything_beside(scratch)
    for line in lines:
        with writes_only_below(scratch):
            assert main([*verb, *line]) == 0, capsys.readouterr().err
    with writes_only_below(scratch):
        assert main([*verb, hostile]) == 2
    assert "data.init_args.cache_dir" in capsys.readouterr().err
    assert everything_beside(scratch) == before
