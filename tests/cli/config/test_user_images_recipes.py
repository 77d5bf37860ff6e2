"""`--images FOLDER` with every recipe of pictures: small ones train a step, those of a paper's scale are built."""

import contextlib
import gc
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import skip_without_packages
from PIL import Image
from runs_before import after_runs_before
from shipped_recipes import LAYERS, RECIPES

from lightspan.cli.config.build import Built, build
from lightspan.cli.config.user_images import with_images
from lightspan.core.absent import without_missing_weights
from lightspan.core.errors import UserError

FOUND = {name: LAYERS[name] for name, recipe in RECIPES.items() if recipe.about.get("modality") == "image"}
"""The layers of all recipes of pictures."""
NAMES = [name for name, layers in FOUND.items() if any("model" in layer for layer in layers)]
LARGE = [name for name in NAMES if "'shards': " in str(FOUND[name])]
NUMBERS = {"bayesian/ssvi_cifar10", "supervised/grassmann_imagenet"}
"""Which start from numbers of their weights, so that they cannot be built without memory for these."""
SMALL = [name for name in NAMES if name not in LARGE]
FAMILIES = {"contrastive", "clustering", "distillation", "masked", "supervised"}
FIRST = {family: next(name for name in SMALL if name.startswith(f"{family}/")) for family in sorted(FAMILIES)}
"""Of each of these families one, which trains in `make test` too."""
QUIET = [
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto"),
    *("trainer.precision=null", "trainer.logger=null", "trainer.enable_progress_bar=false"),
    *("trainer.max_steps=1", "trainer.limit_val_batches=0", "data.init_args.num_workers=0"),
    "data.init_args.batch_size=8",
]
GROUPS = ["data.init_args.groups.sizes=[2, 4]", "data.init_args.groups.from_epochs=[0, 1]"]
"""Of classes, which a batch of eight and five folders have room for."""
WITHOUT = ("preemption", "watchdog", "learning_rate", "progress", "summary", "ledger", "checkpoint")
SLOW = ("feature_pictures", "pictures")
"""Whose drawing takes longer than the rest of a step; that they fit is seen in the sweep."""


def leaving_out(callbacks: Sequence[str]) -> list[str]:
    return [f"trainer.callbacks.{callback}=null" for callback in callbacks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 pictures in five classes: RGB, grey, transparent and of a palette, of odd sizes."""
    made, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(70):
        kind, sides = ("RGB", "L", "RGBA", "LA", "P")[number % 5], (31 + number % 7, 29 + number % 11)
        depth = {"RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(kind, ())
        path = made / ("bird", "cat", "cow", "dog", "hen")[number // 5 % 5] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(draw.integers(0, 256, (*sides, *depth), dtype=np.uint8))
        (picture.convert("P") if kind == "P" else picture).save(path)
    return made


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


STAND_INS = {
    "distillation/sd_fpt_cub": ("scale/stand_ins_sd_fpt",),
    "distillation/unip_infmix": ("scale/stand_ins_unip",),
}
"""Overlays in place of weights of earlier runs, which no machine here has."""


def built(name: str, folder: Path, flags: Sequence[str], size: int = 64) -> Built:
    def make(name: str) -> Built:
        grown = GROUPS if "'groups': {'sizes'" in str(FOUND[name]) else []
        return build(with_images(name, STAND_INS.get(name, ()), folder, size, [*QUIET, *grown, *flags]), Path("run"))

    return after_runs_before(lambda: make(name), lambda before: make(before).model)


def train(name: str, folder: Path, flags: Sequence[str]) -> None:
    """One step. Raises: UserError for a recipe that is refused."""
    with skip_without_packages(), contextlib.redirect_stdout(io.StringIO()):
        made = built(name, folder, flags)
        made.trainer.fit(made.model, datamodule=made.datamodule)
    assert made.trainer.global_step == 1
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def of_one_task(name: str) -> bool:
    return not any("tasks" in layer.get("data", {}).get("init_args", {}) for layer in FOUND[name])


def test_recipes_are_found_at_both_scales() -> None:
    assert min(len(LARGE), sum(name.split("/")[0] in FAMILIES for name in SMALL)) > 20


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.sweep) for name in SMALL]
)
def test_every_small_recipe_takes_a_step_on_a_folder(name: str, folder: Path) -> None:
    if of_one_task(name):
        train(name, folder, leaving_out([*WITHOUT, *SLOW]))
    else:
        with pytest.raises(UserError, match=f"--images gives pictures of one task, but {name} needs several"):
            train(name, folder, [])


@pytest.mark.sweep
@pytest.mark.parametrize("name", FIRST.values())
def test_a_recipe_of_each_family_ends_with_its_pictures(name: str, folder: Path, tmp_path: Path) -> None:
    fast = "trainer.callbacks.feature_pictures.init_args.method=pca"
    train(name, folder, [fast, *leaving_out(WITHOUT)])
    assert (tmp_path / "run/pictures/first-batch.png").exists()


OF_A_FILE = {"compression/pela_imagenet"}
"""Whose head has the form of one in a file."""


@pytest.mark.sweep
@pytest.mark.parametrize("name", filter(of_one_task, sorted({*LARGE} - OF_A_FILE)))
def test_every_recipe_of_a_papers_scale_is_built_for_a_folder(name: str, folder: Path) -> None:
    with skip_without_packages(), without_missing_weights(), torch.device("cpu" if name in NUMBERS else "meta"):
        built(name, folder, ["trainer.callbacks=null"])
    gc.collect()
