"""A run folder of version 0.1.0, from before callbacks and data modules were grouped, is read and resumed today."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from lightspan.cli import main
from lightspan.config.allow import gate
from lightspan.config.moved import CLASSES, MODULES, followed
from lightspan.config.resolve import resolve
from lightspan.config.tree import wrap

EARLIER = Path(__file__).parent / "earlier_run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(EARLIER, folder)
    shutil.copy(folder / "checkpoints/step=4.ckpt", folder / "checkpoints/last.ckpt")
    return folder


def test_its_recipe_names_classes_of_today() -> None:
    config = resolve(str(EARLIER / "resolved.yaml")).config
    callbacks = config["trainer"]["callbacks"]
    assert config["data"]["class_path"] == "lightspan.datamodules.images.small.Digits"
    assert callbacks["checkpoint"]["class_path"] == "lightspan.callbacks.resilience.checkpoint.Checkpoint"


def test_it_is_resumed_from_its_checkpoint(run: Path) -> None:
    assert main(["fit", str(run / "resolved.yaml"), "--run", str(run), "trainer.max_steps=6"]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize("earlier", MODULES)
def test_classes_of_every_module_that_moved_may_be_named_as_before(earlier: str) -> None:
    now = MODULES[earlier]
    classes = [n for n, x in vars(importlib.import_module(now)).items() if isinstance(x, type) and x.__module__ == now]
    named = [name for name in classes if not name.startswith("_")]
    root = wrap({"trainer": {"callbacks": {n: {"class_path": f"{earlier}.{n}"} for n in named}}}, "recipe.yaml")
    assert gate(followed(root)) == []


@pytest.mark.parametrize("earlier", CLASSES)
def test_a_class_with_another_name_may_be_named_as_before(earlier: str) -> None:
    tree = followed(wrap({"trainer": {"callbacks": {"it": {"class_path": earlier}}}}, "recipe.yaml"))
    assert gate(tree) == []
    module, _, name = CLASSES[earlier].rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
