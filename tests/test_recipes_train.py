"""Every recipe of the catalogue: what trains takes three steps; what computes or merges gives its result. Those of
representation learning also train on two ranks, as they are and with a low-rank optimiser by overlay.
"""

import contextlib
import json
import os
import re
from itertools import cycle
from pathlib import Path

import pytest
import rank_processes
import torch
import yaml
from optional import INSTALLS, skip_without_packages
from runs_before import after_runs_before
from safetensors.torch import save_file
from shipped_recipes import LAYERS
from torch import nn

from lightspan.cli.config.build import build, build_parts, resolve
from lightspan.cli.config.resolve import ANY_KIND, Resolved
from lightspan.cli.main import main
from lightspan.core.errors import UserError

SHORT = [
    *("trainer.max_steps=3", "trainer.limit_val_batches=0", "trainer.accelerator=cpu", "data.init_args.batch_size=4"),
    *("trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", "trainer.precision=null"),
    *("trainer.logger=null", "trainer.enable_progress_bar=false"),
    *(
        f"trainer.callbacks.{name}=null"
        for name in ("preemption", "watchdog", "learning_rate", "progress", "summary", "ledger", "checkpoint")
    ),
]
"""Three steps of few samples, with what the recipe itself adds and nothing that writes or listens."""


FEW = {"OnlineProbes": {"bank_samples": 200, "val_samples": 200}, "CollapseSentinel": {"samples": 16}}
"""Class of a callback -> its settings."""


def shortened(name: str, overlays: list[str], flags: list[str] = SHORT) -> Resolved:
    """A recipe with these settings; a batch of a few of each class has two of each, worlds but those of maps are played
    for four episodes, and callbacks that watch read few samples, which come four at a time.
    """
    resolved = resolve(name, overlays, flags)
    given = resolved.config["data"].get("init_args", {})
    pairs = ["data.init_args.per_class=2"] if "per_class" in given else []
    pairs += ["data.init_args.groups.sizes=[2]", "data.init_args.groups.from_epochs=[0]"] if "groups" in given else []
    played = [world for world in ("world", "val_world") if world in given and "maps" not in given[world]["init_args"]]
    pairs += [f"data.init_args.{world}.init_args.episodes=4" for world in played]
    for entry, callback in resolved.config["trainer"]["callbacks"].items():
        for key, samples in FEW.get(callback["class_path"].rpartition(".")[2] if callback else "", {}).items():
            pairs.append(f"trainer.callbacks.{entry}.init_args.{key}={samples}")
    return resolve(name, overlays, [*flags, *pairs]) if pairs else resolved


LARGE = {"language/smollm2_svfit"}
"""More than a hundred million weights, whose reading alone takes the time of a sweep's test."""

UNDONE = {
    *("analysis/extraction_attack", "analysis/memorised_neurons", "merging/prune_memorised"),
    *("merging/fisher", "merging/regmean", "merging/interference"),
    "analysis/align_files",
}
"""They read what other runs left (masks, statistics, task vectors, features); they are only built here, and run in
tests of merging and estimators."""


TWO_LANGUAGES = "data.init_args.languages=[es,fr]"
ONE_CATEGORY = "data.init_args.categories=[Hinge]"
FEWER = {
    "analysis/align_ldraw": [
        f"inputs.{name}.init_args.{ONE_CATEGORY}" for name in ("first", "second", "first_query", "second_query")
    ],
    "analysis/name_ldraw": [f"inputs.query.init_args.{ONE_CATEGORY}"],
    "analysis/ast_probe": [
        *(f"inputs.code.init_args.{fewer}" for fewer in ("functions=8", "words=16", "layers=[0,1]")),
        "estimator.init_args.epochs=1",
    ],
    "analysis/imagenet_protocol": ["estimator.init_args.epochs=1", "estimator.init_args.tuning_epochs=[1,1]"],
    "analysis/label_saving_lite0": ["estimator.init_args.labels=[16,64]", "estimator.init_args.draws=1"],
    "analysis/universal_perturbation": ["estimator.init_args.steps=2", "estimator.init_args.hardening_steps=1"],
    "selection/climb": ["estimator.init_args.rounds=[4,2]", "estimator.init_args.candidates=500"],
    "analysis/spoken_languages": [f"inputs.{name}.init_args.{TWO_LANGUAGES}" for name in ("bank", "query")],
}
"""What a recipe that only computes reads here, where all of its data takes more than the time of a sweep's test."""


def untrained(name: str) -> nn.Module:
    return build(shortened(name, [])).model


def gives_its_result(resolved: Resolved, capsys: pytest.CaptureFixture[str]) -> None:
    """`lightspan run`, for a merger of two small checkpoints."""
    words = ["run", resolved.name, "--run", "computed", "--features", "features", "--device", "cpu"]
    words += FEWER.get(resolved.name, [])
    for number, checkpoint in enumerate(resolved.config.get("checkpoints", {})):
        save_file({"weight": torch.full((2, 3), float(number))}, f"{checkpoint}.safetensors")
        words.append(f"checkpoints.{checkpoint}={checkpoint}.safetensors")
    with skip_without_packages():
        if main(words):
            raise UserError(capsys.readouterr().err)
    assert json.loads(Path("computed/result.json").read_text())["figures"]


PAPER = (
    r"'shards': |amazon/|lra_image/|runs/clip/|isic19/|oxford_pets/|stable-diffusion|cion_al|cifar100_pictures|eurosat|"
    r"xtail/|mrpc/|chat\.jsonl|kinetics400/|videomix2m/|ct_scans|brats2021|instructions/|nerfmae_features|luna16|"
    r"brain_and_body_scans|ShapeNetCore|ModelNet40|zinc_standard|structured3d/|s3dis/|ffhq_shots|gtsrb/|'msls'|"
    r"'imagenet/train'"
)
"""In a recipe of a paper's scale, which is planned in other tests: no machine here has its data."""

DRAWN = {"contrastive/e_ssl3d_kitti360", "generative/ponder_v2_rooms", "masked/gaussian2scene_rooms"}
"""At a paper's scale too, on data that are drawn: thousands of scenes."""
HERE = [name for name, layers in LAYERS.items() if name not in DRAWN and not re.search(PAPER, str(layers))]
"""What a machine can run with the extras and packages that the recipe asks for."""
TRAINED = [name for name in HERE if any("model" in layer for layer in LAYERS[name])]
FIRST = {name.split("/")[0]: name for name in reversed(TRAINED)} | {
    "clustering": "clustering/swav",
    "masked": "masked/mae",
}
"""Family -> the recipe of it that `make test` and `make quick` train too: the first one, or a quick one."""


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.runs] * (name in LARGE) + [pytest.mark.smoke] * (name in FIRST.values())


def test_most_recipes_are_here_and_those_of_a_papers_scale_are_not() -> None:
    assert len(HERE) > 100
    assert {"contrastive/simclr", "language/quickstart", "analysis/resize_normalise"} <= set(HERE)
    assert "contrastive/moco_imagenet" not in HERE
    assert len(FIRST) > 10


@pytest.mark.sweep
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in TRAINED])
def test_every_recipe_trains_three_steps_where_its_data_and_weights_are_installed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with skip_without_packages():
        built = after_runs_before(lambda: build(shortened(name, []), tmp_path), untrained)
        built.trainer.fit(built.model, datamodule=built.datamodule)
    assert type(built.model).__module__.startswith("lightspan.methods")
    assert built.trainer.global_step == 3


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in HERE if name not in TRAINED])
def test_every_recipe_that_computes_gives_its_result(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resolved = resolve(name, kinds=ANY_KIND)
    with skip_without_packages():
        assert after_runs_before(lambda: build_parts(resolved), untrained)
        if name not in UNDONE:
            gives_its_result(resolved, capsys)


FAMILIES = ("clustering", "contrastive", "distillation", "image_text", "masked", "supervised")
ON_RANKS = [*SHORT, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=2"]
LOW_RANK = ("optimizer.LowRank", *(f"presets.{name}" for name in ("GaLore", "APOLLO", "LDAdam", "DCTAdamW", "Trion")))


def small(family: str) -> list[str]:
    """Recipes of a family that train on what a machine here has."""
    return [name for name in TRAINED if name.startswith(f"{family}/")]


def _recipes(rank: int, wanted: list[tuple[str, list[str]]], folder: str, port: int) -> None:
    os.chdir(folder)
    rank_processes.join(rank, port)
    for name, overlay in wanted:
        try:
            built = build(shortened(name, overlay, ON_RANKS), Path(folder, "run"))
            built.trainer.fit(built.model, datamodule=built.datamodule)
        except UserError as error:
            frames = overlay and "the module has orthonormal frames" in str(error)
            if not frames and INSTALLS not in str(error):
                raise AssertionError(f"{name} with {overlay}: {error}") from error
            continue
        assert (built.trainer.global_step, built.trainer.world_size) == (2, 2), (name, overlay)
        assert all(parameter.isfinite().all() for parameter in built.model.parameters()), (name, overlay)


@pytest.mark.sweep
@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_representation_learning_train_on_two_ranks(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = small(family)
    assert len(names) >= 2
    wanted: list[tuple[str, list[str]]] = [(name, []) for name in names]
    for name, kind in zip(names, cycle(LOW_RANK), strict=False):
        optimizer = {"class_path": f"lightspan.optim.low_rank.{kind}", "init_args": {"lr": 0.001, "rank": 4}}
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}}))
        wanted.append((name, [str(file)]))
    for name in names:
        if "runs/" in str(LAYERS[name]):  # weights that it starts from
            with contextlib.suppress(UserError):  # of a package that is not installed, or the ranks raise it
                after_runs_before(lambda name=name: build(shortened(name, [])), untrained)
    rank_processes.start(_recipes, 2, wanted, str(tmp_path), rank_processes.free_port())
