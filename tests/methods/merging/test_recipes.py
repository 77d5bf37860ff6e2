"""The merging recipes at the papers' scale are checked and planned where neither their weights nor their data are."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from lightspan.cli.config.recipes import catalogue_names
from lightspan.cli.config.resolve import resolve
from lightspan.cli.main import main

SCALE = [name for name in catalogue_names() if name.startswith("merging/") and name.endswith("_clip")]
# The network alone is smaller here, since every test has seconds: `lightspan plan RECIPE -c scale/stand_ins_clip` as it
# is takes 13 GiB.
SMALL = (
    "model.init_args.backbone={class_path: timm.models.vision_transformer.VisionTransformer, init_args: "
    "{patch_size: 32, embed_dim: 32, depth: 1, num_heads: 2, num_classes: 512}}"
)


def test_the_recipes_at_the_papers_scale_compute_clip() -> None:
    """The network that its name stands for, whose features meet embeddings of classes at length 1."""
    assert len(SCALE) == 4
    for name in SCALE:
        config = resolve(name).config
        given = config["model"]["init_args"]
        assert given["backbone"] == {
            "class_path": "lightspan.backbones.published.timm_vit",
            "init_args": {"name": "vit_base_patch32_clip_quickgelu_224", "outputs": 512},
        }
        heads = [head["init_args"]["module"]["class_path"] for head in given["heads"].values()]
        assert heads == ["lightspan.nn.heads.cosine_head.CosineHead"] * 8
        assert len(config["data"]["init_args"]["tasks"]) == 8


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """A plan leaves gigabytes in cycles, which the next one would come on top of."""
    yield
    gc.collect()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.runs
@pytest.mark.parametrize("name", SCALE)
def test_a_recipe_at_the_papers_scale_is_planned_with_stand_ins(name: str, capsys: Any) -> None:
    assert main(["check", name]) == 0
    assert main(["plan", name, "-c", "scale/stand_ins_clip", "data.init_args.batch_size=2", SMALL]) == 0
    said = capsys.readouterr().out
    assert "optimiser state" in said
    assert "counted by a real step" not in said
