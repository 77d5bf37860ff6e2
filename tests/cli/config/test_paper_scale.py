"""Recipes at the scale of their papers: every method has one, and in it the weights decay that decay in its authors'
code."""

import pkgutil
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import skip_without_packages
from shipped_recipes import CONFIGS
from shipped_recipes import RECIPES as CATALOGUE

import lightspan.methods
import lightspan.recipes
from lightspan.cli.config.build import build, resolve
from lightspan.training.method import Method

REPRESENTATIONS = {"contrastive", "distillation", "clustering", "masked", "image_text", "supervised"}

WITHOUT = {
    "Learning to Prompt for Vision-Language Models (arXiv 2109.01134)": "image_text/pre_eurosat without `encoder`",
    "lightspan.methods.generative.vae": "generative/vae_letters has pictures of the paper's size, 28 x 28 pixels",
    "lightspan.methods.supervised.regressor": "no paper of its own: least squares on tables",
    "none": "supervised/linear is the baseline of supervised/grassmann",
}
"""Methods and papers without a recipe at a paper's scale, and why."""

DRAWN = {"contrastive/e_ssl3d_kitti360", "generative/ponder_v2_rooms", "masked/gaussian2scene_rooms"}
"""At a paper's scale, but on data that are drawn here in place of its own."""

UNKNOWN = {
    *("contrastive/hydra_imagenet", "clustering/mlc_cifar100", "supervised/look_imagenet"),
    *("supervised/heuristic_mtl_openimages", "image_text/m3i_vit_b16", "contrastive/softcon_ssl4eo"),
}
"""There is no code of their authors; headers say what was assumed."""

WITHOUT_DECAY = {
    *("contrastive/supremix_agedb", "clustering/depict_mnist"),
    *("image_text/dptr_union14m", "masked/ul2_c4", "supervised/word_reader_union14m"),
    *("contrastive/starbucks_msmarco", "masked/spt_lra_image", "supervised/sequence_lra_image"),
    *("supervised/tag_classifier_jft", "masked/models_genesis_luna", "masked/attribute_masking_zinc"),
    "supervised/selavpr_msls",
}


ADAPTED = {"image_text/pllava_vicuna7b": "network.projector."}
"""Callbacks, which are left out here, leave nothing but this and LoRAs to train."""

ONE_RANK = [
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto"),
    *("trainer.precision=null", "trainer.logger=null", "trainer.callbacks=null"),
]


def at_scale(config: dict[str, Any]) -> bool:
    """A paper's data come as shards, folders of pictures or videos, words, texts or arrays, which no package has."""
    files = (
        "'shards': ",
        ".folder.ImageFolder'",
        ".folder.VideoFolder'",
        ".captioned.CaptionedVideos'",
        ".folder.VolumeFolder'",
        ".radiance.RadianceFolder'",
        ".points.folder.PointFolder'",
        ".graph.folder.GraphFolder'",
        ".places.PlaceFolder'",
        ".modelnet.ModelNet40'",
        ".spelling.WordList'",
        ".own.OwnSequences'",
        ".domains.DomainFiles'",
        ".labelled.LabelledTextFiles'",
        ".labelled.LabelledScans'",
        ".chat.Chat'",
    )
    return any(part in str(config["data"]) for part in files)


RECIPES = {name: config for name, config in CONFIGS.items() if "model" in config}
LARGE = [name for name, config in RECIPES.items() if name.split("/")[0] in REPRESENTATIONS and at_scale(config)]
ALL_DECAY = {
    name
    for name in LARGE
    if any(rule["match"] == ["*"] for rule in RECIPES[name]["model"]["init_args"].get("groups", {}).get("rules", ()))
}
"""Recipes whose authors give their optimiser one list of all parameters, and which say so by a rule for all."""


def test_every_method_and_every_paper_has_a_small_recipe_and_one_at_its_scale() -> None:
    sizes: dict[str, set[bool]] = defaultdict(set)
    for info in pkgutil.walk_packages(lightspan.methods.__path__, "lightspan.methods."):
        if not info.ispkg:  # a method is a file
            sizes[info.name] = set()
    for name, config in RECIPES.items():
        large = at_scale(config) or name in DRAWN
        sizes[config["model"]["class_path"].rpartition(".")[0]].add(large)
        if name.split("/")[0] in REPRESENTATIONS:
            sizes[CATALOGUE[name].about["paper"]].add(large)
    assert {"lightspan.methods.contrastive.simclr", "lightspan.methods.masked.mae"} <= sizes.keys()
    assert {key for key, found in sizes.items() if False not in found} == set()
    assert {key for key, found in sizes.items() if True not in found} == set(WITHOUT)


def stand_ins() -> dict[str, list[str]]:
    """Recipe -> overlays that replace weights and data that are not here: each names the recipe that it is for."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in Path(lightspan.recipes.__file__).parent.glob("scale/stand_ins_*.yaml"):
        for name in re.findall(r"lightspan plan (\S+) -c", path.read_text()):
            found[name].append(f"scale/{path.stem}")
    return found


STAND_INS = stand_ins()


def built(name: str) -> Method:
    """The method of a recipe, without numbers in its weights where it can be made so."""
    overlays = STAND_INS.get(name) or (["scale/stand_ins_pairs"] if "clip" in name else [])
    flags = [*ONE_RANK]
    if "/cae" in name:
        flags.append("model.init_args.tokenizer.init_args.weights=null")
    if "/selavpr" in name:
        flags.append("model.init_args.backbone.init_args.network.init_args.path=null")
    if re.search(r"/dinov\d_continued", name):
        flags.append("model.init_args.backbone.init_args.path=null")
    with torch.device("cpu" if "grassmann" in name else "meta"):  # whose frames are the Q of a QR of numbers
        model = build(resolve(name, overlays, flags)).model
    assert isinstance(model, Method)
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(LARGE) - UNKNOWN))
def test_what_decays_is_what_decays_in_the_authors_code(name: str) -> None:
    with skip_without_packages():
        model = built(name)
    groups = model.groups.optimizer(model, model.optimizer).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    own = ADAPTED.get(name, "")
    trained = {key: each for key, each in model.named_parameters() if each.requires_grad and key.startswith(own)}
    spared = {key for key, parameter in trained.items() if id(parameter) not in decayed}
    if name == "distillation/fst_cityscapes":  # the encoder's norms, and nothing by its number of axes
        assert spared == {key for key in trained if key.startswith("student.0.encoder.") and "norm" in key}
    elif name in ALL_DECAY:
        assert not spared
    elif name in WITHOUT_DECAY:
        assert spared == set(trained)
    elif name == "supervised/grassmann_imagenet":
        assert spared == {"head.frame_KFR"}
    else:  # norms, biases, LayerScale and CLIP's temperature; tokens have three axes in their authors' code
        tokens = ("mask_token", "cls_token")
        exempt = {key for key, each in trained.items() if each.ndim < 2 and not key.endswith(tokens)}
        if "/spark" in name:  # which names its mask tokens as exempt
            exempt |= {f"decoder.mask_tokens.{level}" for level in range(4)}
        if "/point_mae" in name or "/i2p_mae" in name:  # which name all tokens as exempt
            exempt |= {"decoder.mask_token"}
        assert spared == exempt


def test_spark_has_its_authors_betas_and_ends_of_the_rate() -> None:
    """keyu-tian/SparK: `ada` of a ResNet in arg_util.py, `lr_wd_annealing` in lr_control.py."""
    for name, lr in (("masked/spark_imagenet", 2e-4 * 4096 / 256), ("masked/spark_ct_lidc", 2e-4 * 32 / 256)):
        model = built(name)
        optimizer = model.groups.optimizer(model, model.optimizer)
        assert all(tuple(group["betas"]) == (0.9, 0.95) for group in optimizer.param_groups)
        assert model.lr_scheduler is not None
        schedule: Any = model.lr_scheduler(optimizer, 160_000)
        ends = [lr * schedule.factor(step) for step in (0, 4_000, 160_000)]
        assert ends == pytest.approx([0.005 * lr, lr, 0.001 * lr], rel=0.05)
        assert schedule.decay_factor == pytest.approx(0.2 / 0.04)


RISING = [0, 0.1 / 3, 0.2 / 3, 0.1]
DROPPED: dict[str, dict[str, list[float]]] = {
    "masked/cae_imagenet": {"regressor": RISING, "decoder": RISING},
    "distillation/unip_infmix": {"backbone": [0.1] * 12},
    "masked/point_mae_shapenet": {"backbone": [0.1 * block / 11 for block in range(12)], "decoder": RISING},
}
"""Stochastic depth of the blocks of parts, where timm's own rule for an encoder does not say it."""


@pytest.mark.parametrize("name", DROPPED)
def test_branches_are_dropped_as_in_the_authors_code(name: str) -> None:
    model = built(name)
    for part, expected in DROPPED[name].items():
        blocks = next(each for each in getattr(model, part).modules() if hasattr(each, "blocks")).blocks
        shares = [max((getattr(each, "drop_prob", 0) for each in block.modules()), default=0) for block in blocks]
        assert shares == pytest.approx(expected)


def test_there_are_recipes_at_the_scale_of_papers() -> None:
    assert len(LARGE) > 20
    assert set(LARGE) >= UNKNOWN
    assert {"contrastive/moco_imagenet", "clustering/swav_imagenet", "image_text/pre_eurosat"} <= ALL_DECAY
