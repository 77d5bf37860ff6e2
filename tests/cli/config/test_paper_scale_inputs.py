"""Every recipe at the scale of its paper loads what its header says that it needs, and takes a batch of it.

`stand_ins.at_scale` finds the recipes and `stand_ins.stand_in` writes what they read; its module says what a new kind
of input needs. No number of a large network is computed: shapes alone pass through `training_step`.
"""

import contextlib
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from optional import skip_without_packages
from safetensors.torch import save_file
from shipped_recipes import RECIPES as CATALOGUE
from stand_ins import DATA, PUBLISHED, Asked, NoStandIn, at_scale, published, recipe_of, stand_in
from torch import Tensor

from lightspan.cli.config.build import Built, build, resolve
from lightspan.cli.planning.rehearsal import (
    loss_on_shapes,
    optimizers,
    prepare_model,
    silent,
    without_logging,
    without_trace,
)
from lightspan.cli.planning.shapes import on_meta_first
from lightspan.cli.planning.step_memory import is_meta
from lightspan.core.errors import UserError
from lightspan.core.files.tensors import stored_tensors
from lightspan.core.source import Definition, locate
from lightspan.methods.masked.smae import SMAE

SMALL = 3_000_000
"""Parameters of a model that takes a real step."""
NEED_NUMBERS = (SMAE,)
"""Draw masks on the host, of the tokens themselves."""
pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
RECIPES = at_scale()
SAMPLE = {"adaptation/codyra_clip", "language/cpt_amazon", "robustness/nmtune_pets"}
"""Folders of pictures, texts and weights of timm's: `make test` feeds these too."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    gc.freeze()  # the collection below searches what the test made, not all modules and caches
    yield
    gc.collect()  # trainers and models refer to one another, and dozens of large networks would wait for it
    gc.unfreeze()


def takes_a_batch(built: Built) -> bool:
    """Reads a batch of the real data module and passes its shapes through `training_step` under the real optimisers.

    Returns: whether it did; the model may be small enough for a real step.
    """
    size = sum(parameter.numel() for parameter in built.model.parameters())
    if size <= SMALL or isinstance(built.model, NEED_NUMBERS):
        return False
    trainer, model, data = built.trainer, built.model, built.datamodule
    assert data is not None
    data.trainer = trainer
    with silent():
        data.prepare_data()
        data.setup("fit")
        with torch.device("meta") if is_meta(model) else contextlib.nullcontext():
            prepare_model(trainer, model, data)
        optimizers(trainer, model)
        batch = next(iter(data.train_dataloader()))
    with without_logging(model):
        output = loss_on_shapes(trainer, model.train(), batch)
    loss = output if isinstance(output, Tensor) else output["loss"]
    assert loss.requires_grad
    assert loss.numel() == 1
    return True


def feed(name: str, *faults: str) -> None:
    """Raises: whatever the recipe, changed by these flags, stumbles over."""
    flags = [*stand_in(name), *faults]
    with silent(), skip_without_packages(), without_trace(resolve(name, [], flags)) as (resolved, folder):
        if not on_meta_first(resolved, takes_a_batch, folder):
            built = build(resolved, folder)
            built.trainer.fit(built.model, datamodule=built.datamodule)
            assert built.trainer.global_step == 1


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.smoke if name in SAMPLE else ()) for name in RECIPES]
)
def test_a_recipe_loads_what_it_needs_and_takes_a_batch(name: str) -> None:
    feed(name)


def test_classes_that_stand_ins_write_data_for_are_there() -> None:
    assert [name for name in DATA if not isinstance(locate(name), Definition)] == []


def test_recipes_of_all_families_are_found() -> None:
    assert len(RECIPES) > 60
    families = {name.split("/")[0] for name in RECIPES}
    assert {"contrastive", "masked", "merging", "language", "image_text", "robustness", "bayesian"} <= families
    assert set(RECIPES) >= SAMPLE


def header_faults(name: str, read: list[Asked], needs: str) -> list[str]:
    """What a recipe reads that its `needs` does not say, and what this says that it does not read."""
    runs = {recipe_of(each.run) for each in read if each.run is not None and published(each.place) is None}
    prefixes = {each.place: [p for p in above(each.place) if p != "runs"] for each in read}
    faults = [
        f"{name} reads {each.place}, and its needs do not name that"
        for each in read
        if not (each.run is not None and any(run in needs for run in runs))
        and not any(re.search(rf"(?<![\w/.-]){re.escape(part)}(?![\w/-])", needs) for part in prefixes[each.place])
    ]
    known = {part.removeprefix("/") for parts in prefixes.values() for part in parts} | runs
    said = re.findall(r"\b[a-z][\w.-]*/[\w./-]*\w|[\w-]+\.(?:safetensors|jsonl|npz|txt)\b", needs)
    return faults + [f"{name} needs {word}, which it does not read" for word in said if word not in known]


def above(place: str) -> list[str]:
    """The place itself, and the folders that it is in."""
    return [place, *(str(parent) for parent in Path(place).parents if str(parent) != ".")]


def test_what_a_header_says_that_a_recipe_needs_is_what_it_reads() -> None:
    assert [
        fault for name, read in RECIPES.items() for fault in header_faults(name, read, CATALOGUE[name].about["needs"])
    ] == []
    name = "supervised/sequence_lra_image"
    for changed, fault in {
        "arrays in lra_image, a GPU": "runs/spt_lra_image",
        "a run of masked/spt_lra_image": "lra_image/train.npz",
        "arrays in lra_image, a run of masked/spt_lra_image, weights in vit.safetensors": "needs vit.safetensors",
    }.items():
        assert any(fault in found for found in header_faults(name, RECIPES[name], changed)), changed


TIMM = "model.init_args.backbone.init_args.network.init_args.network.init_args"


@pytest.mark.sweep
def test_a_recipe_that_does_not_fit_its_inputs_fails() -> None:
    for name, fault, said in [
        ("contrastive/softcon_ssl4eo", f"{TIMM}.prefix=backbone.", "do not fit"),
        ("contrastive/softcon_ssl4eo", f"{TIMM}.name=vit_base_patch14_dinov2", "do not fit"),
        ("robustness/nmtune_pets", "model.init_args.mlp.init_args.in_features=2047", "in_features"),
        ("robustness/nmtune_pets", "model.init_args.num_classes=2", "classes"),
    ]:
        with pytest.raises(UserError, match=said):
            feed(name, fault)


def test_a_tensor_that_the_file_lacks_is_missed() -> None:
    stand_in("supervised/sequence_lra_image")
    file = next(Path("runs").rglob("*.safetensors"))
    tensors, _ = stored_tensors(file)
    del tensors[next(name for name in tensors if name.startswith("backbone."))]
    save_file(tensors, file)
    with pytest.raises(UserError, match="is missing"):
        feed("supervised/sequence_lra_image")


def test_what_nothing_can_stand_in_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PUBLISHED, "dinov2_vits14.safetensors")
    with pytest.raises(NoStandIn, match=r"softcon_ssl4eo reads dinov2_vits14\.safetensors .* add a row to PUBLISHED"):
        stand_in("contrastive/softcon_ssl4eo")
