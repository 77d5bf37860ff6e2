"""The sentinel's table: what is planted is found and named, and healthy runs of all shipped methods raise no alarm."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collapsing_runs import PLANTED, RATES, Pairs
from lightning import seed_everything
from optional import skip_without_packages

from lightspan.callbacks.watching.collapse_sentinel import CollapseSentinel
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import ANY_KIND, resolve
from lightspan.core.errors import UserError

STEPS = 60
KINDS = ("no stop-gradient, no negatives", "dead projector", "SimCLR at a rate 10,000 times as high")
"""One case of each kind: a collapse, a dead start, an explosion."""
RECIPES = Path(__file__).parents[2] / "recipes"
FAMILIES = ("clustering", "contrastive", "distillation", "masked")
WATCHED = re.compile(r"^base: fashion_mnist$|CollapseSentinel", re.MULTILINE)
AWAY = re.compile(r"ssl4eo|path: runs/|collapse: null")
"""In a recipe whose data or teacher are not here, or that does without a sentinel."""


def said_of(make_trainer, module: Any, **settings: Any) -> str:
    watch = CollapseSentinel(samples=128, **settings)
    seed_everything(3, verbose=False)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        make_trainer(max_steps=STEPS, callbacks=[watch]).fit(module, datamodule=Pairs())
    return said.getvalue()


def found(make_trainer, name: str) -> None:
    make, expected = PLANTED[name]
    said = said_of(make_trainer, make())
    assert re.search(expected, said), f"{name}: {said or 'nothing was said'}"


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", KINDS)
def test_a_failure_of_each_kind_is_found(make_trainer, name: str) -> None:
    found(make_trainer, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in PLANTED if name not in KINDS])
def test_each_planted_failure_is_found(make_trainer, name: str) -> None:
    found(make_trainer, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", RATES)
def test_the_same_methods_at_their_rate_raise_no_alarm(make_trainer, name: str) -> None:
    make: Callable[[], Any] = RATES[name]
    assert "CollapseSentinel" not in said_of(make_trainer, make())


@pytest.mark.parametrize("action", ["stop", "roll_back"])
def test_a_run_that_blows_up_is_stopped_or_rolled_back(make_trainer, action: str) -> None:
    make, expected = PLANTED["SimCLR at a rate 10,000 times as high"]
    if action == "stop":
        with pytest.raises(UserError, match=expected):
            said_of(make_trainer, make(), action=action)
    else:
        said = said_of(make_trainer, module := make(), action=action, rate=1e-4)
        assert "went back to step 0's weights" in said
        assert "Roll back 2" not in said
        assert all(parameter.isfinite().all() for parameter in module.parameters())


def watched_recipes() -> list[str]:
    """Of each self-supervised method the first recipe with a sentinel whose data are here, by the text of its file."""
    first: dict[str, str] = {}
    for family in FAMILIES:
        for file in sorted((RECIPES / family).glob("*.yaml")):
            text = file.read_text()
            method = re.search(r"class_path: (lightspan\.methods\.\S+)", text)
            if method and WATCHED.search(text) and not AWAY.search(text):
                first.setdefault(method[1], f"{family}/{file.stem}")
    return list(first.values())


def test_recipes_that_are_watched_are_found() -> None:
    assert {"masked/mae", "contrastive/simclr", "distillation/dino", "clustering/swav"} <= set(watched_recipes())


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.runs if "scat" in name else ()) for name in watched_recipes()]
)
def test_a_short_run_of_each_watched_recipe_raises_no_alarm(name: str, tmp_path) -> None:
    config = resolve(name, kinds=ANY_KIND).config
    given = config["data"].get("init_args", {})
    others = [f"trainer.callbacks.{one}=null" for one in config["trainer"]["callbacks"] if one != "collapse"]
    fewer = [] if {"per_class", "groups"} & given.keys() else ["data.init_args.batch_size=32"]
    flags = [
        *("trainer.max_steps=30", "trainer.limit_val_batches=0", "trainer.accelerator=cpu", "trainer.logger=null"),
        *("trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false"),
        "trainer.callbacks.collapse.init_args.samples=64", *others, *fewer,
    ]  # fmt: skip
    with skip_without_packages():
        built = build(resolve(name, [], flags), tmp_path)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        built.trainer.fit(built.model, datamodule=built.datamodule)
    assert "CollapseSentinel" not in said.getvalue()
