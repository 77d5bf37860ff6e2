"""`lightspan new`: what it writes is clean, checks, trains and passes its own test, in one's own project and here."""

import importlib
import io
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightspan.cli.commands import new
from lightspan.cli.config.build import build
from lightspan.cli.config.recipes import load
from lightspan.cli.config.resolve import resolve
from lightspan.cli.main import main

ROOT = Path(__file__).parents[3]
NAME = "brand_new_method"
SKELETONS = ("contrastive", "distillation", "masked", "clustering", "supervised", "language", "generative")
FILES = {f"{NAME}/__init__.py", f"{NAME}/method.py", f"{NAME}.yaml", f"test_{NAME}.py", f"evidence_{NAME}.py"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["new", f"contrastive/{NAME}"]) == 0
    yield tmp_path
    for module in [module for module in sys.modules if NAME in module]:
        del sys.modules[module]


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_clean(folder: Path, *options: str) -> None:
    for command in (["check"], ["format", "--diff"]):
        line = [sys.executable, "-m", "ruff", *command, "--no-cache", *options, "."]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.runs
@pytest.mark.parametrize("family", SKELETONS)
def test_a_skeleton_of_each_family_trains_and_passes_its_test(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"a_{family}_method"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["new", f"{family}/{name}"]) == 0
    assert written(tmp_path) == {one.replace(NAME, name) for one in FILES}
    assert_clean(tmp_path, "--isolated", "--config", "line-length = 120")
    assert main(["check", f"{name}.yaml", "--allow-module", name]) == 0
    assert "no problems" in capsys.readouterr().out
    short = ["trainer.max_steps=3", "trainer.limit_val_batches=1", "trainer.accelerator=cpu"]
    built = build(resolve(f"{name}.yaml", [], short, [name]), tmp_path / "run")
    built.trainer.fit(built.model, datamodule=built.datamodule)
    assert built.trainer.global_step == 3
    tests = importlib.import_module(f"test_{name}")
    names = [one for one in vars(tests) if one.startswith("test_")]
    assert len(names) == 5
    for one in names:
        getattr(tests, one)()
    before, after = importlib.import_module(f"evidence_{name}").train(seed=0, epochs=1)
    assert 0 <= before < 100
    assert 10 < after < 100
    for module in [module for module in sys.modules if name in module]:
        del sys.modules[module]


def test_each_kind_of_skeleton_is_tried_and_an_unknown_family_learns_of_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = new._kinds()
    assert {id(kinds[family]) for family in SKELETONS} == {id(kind) for kind in kinds.values()}
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["contrastiv/foo"], "the family contrastiv; did you mean contrastive"),
        (["selection/foo"], "add --like FAMILY"),
        (["selection/foo", "--like", "maskd"], "the family maskd; did you mean masked"),
    ):
        assert main(["new", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["new", "selection/foo", "--like", "masked"]) == 0
    assert "family: selection" in (tmp_path / "foo.yaml").read_text()
    assert "HiddenPatches" in (tmp_path / "foo" / "method.py").read_text()


def test_in_a_checkout_the_files_join_the_house_and_touch_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pyproject.toml", "framework/training/method.py", "framework/methods/supervised/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    before = {name: (tmp_path / name).read_bytes() for name in written(tmp_path)}
    assert main(["new", "supervised/abc", "--in", str(tmp_path)]) == 0
    method, recipe = "framework/methods/supervised/abc.py", "recipes/supervised/abc.yaml"
    test, evidence = "tests/methods/supervised/test_abc.py", "evidence/test_abc.py"
    assert written(tmp_path) - before.keys() == {method, recipe, test, evidence}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert_clean(tmp_path)
    assert "from lightspan.methods.supervised.abc import Abc" in (tmp_path / test).read_text()
    about = load(str(tmp_path / recipe)).about
    assert (about["family"], about["evidence"]) == ("supervised", evidence)
    said = capsys.readouterr().out
    assert "It runs as it is" not in said  # the installed code is that of another checkout
    assert f"install it first. Next:\n  cd {tmp_path}\n  pip install -e .\n  lightspan check supervised/abc\n" in said
    assert said.endswith("  make pages\n")
    assert re.search("^docs:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_checkout_that_is_imported_needs_no_installation(tmp_path: Path) -> None:
    assert new._is_imported(ROOT)
    assert not new._is_imported(tmp_path)


def test_nothing_is_overwritten(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / f"{NAME}/__init__.py").unlink()
    (own / f"{NAME}.yaml").write_text("mine: true\n")
    assert main(["new", f"contrastive/{NAME}"]) == 2
    assert f"{NAME}.yaml" in capsys.readouterr().err
    assert (own / f"{NAME}.yaml").read_text() == "mine: true\n"
    assert not (own / f"{NAME}/__init__.py").exists()


def test_nothing_is_written_through_a_link_out_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pyproject.toml", "framework/training/method.py"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text((ROOT / name).read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "recipes").symlink_to(tmp_path / "out")
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    before = written(tmp_path)
    assert main(["new", "supervised/abc", "--in", str(tmp_path / "in")]) == 2
    assert "recipes is a link that leads out of the folder of --in" in capsys.readouterr().err
    assert written(tmp_path) == before
    (tmp_path / "in" / "recipes").unlink()
    assert main(["new", "supervised/abc", "--in", str(tmp_path / "linked")]) == 0  # which the user named


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alone", "'alone' must be FAMILY/NAME"),
        ("Big/name", "must be FAMILY/NAME"),
        ("../up/name", "must be FAMILY/NAME"),
        ("a/b/c", "must be FAMILY/NAME"),
        ("contrastive/two__lines", "must be FAMILY/NAME"),
        ("contrastive/class", "not a Python keyword"),
        ("scale/name", "must be FAMILY/NAME"),
        (f"contrastive/{'a' * 41}", "at most 40"),
        ("contrastive/json", "a package named json would hide the installed one"),
        ("contrastive/torch", "a package named torch would hide the installed one"),
        ("contrastive/digits", "'contrastive/digits' gives a class Digits, but evidence_digits.py already has one"),
        ("contrastive/trainer", "gives a class Trainer, but evidence_trainer.py already has one"),
        ("contrastive/user_error", "gives a class UserError, but test_user_error.py already has one"),
        ("contrastive/method", "gives a class Method, but method/method.py already has one"),
        ("contrastive/tensor", "gives a class Tensor, but tensor/method.py already has one"),
        ("contrastive/m_l_p", "gives a class MLP, but test_m_l_p.py already has one"),
        ("contrastive/s_h_a_p_e", "gives a class SHAPE, but test_s_h_a_p_e.py already has one"),
        ("contrastive/none", "gives a class None, but Python already has one"),
        ("contrastive/value_error", "gives a class ValueError, but Python already has one"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == 2
    assert message in capsys.readouterr().err
    assert not written(tmp_path)


class Closed(io.StringIO):
    """Standard output that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_is_gone_leaves_a_whole_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        main(["new", f"contrastive/{NAME}"])
    assert written(tmp_path) == FILES


def test_the_templates_are_part_of_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "framework/cli/commands"
    shipped = {path for pattern in patterns["lightspan.cli.commands"] for path in folder.glob(pattern)}
    templates = {path for path in (folder / "templates").rglob("*") if path.is_file()}
    assert len(templates) == 4 + len(SKELETONS) + 2
    assert templates <= shipped


def test_a_folder_inside_a_checkout_is_neither_the_checkout_nor_a_project_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "framework" / "methods"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('name = "lightspan"\n')
    (tmp_path / "framework" / "training").mkdir()
    (tmp_path / "framework" / "training" / "method.py").touch()
    monkeypatch.chdir(inner)
    before = written(tmp_path)
    assert main(["new", f"contrastive/{NAME}"]) == 2
    said = capsys.readouterr().err
    assert f"{inner} lies inside a checkout of lightspan; add the method to that with --in {tmp_path}, or name" in said
    assert written(tmp_path) == before


def test_a_project_of_any_bytes_is_no_checkout(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_bytes(b'\xff\xfe name = "x"')
    assert not new.is_checkout(tmp_path)
    project.unlink()
    os.mkfifo(project)
    assert not new.is_checkout(tmp_path)
    assert new.is_checkout(ROOT)
