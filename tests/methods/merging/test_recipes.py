"""The merging recipes at the papers' scale are checked and planned where neither their weights nor their data are."""

from typing import Any

import pytest

from lightspan.cli import main
from lightspan.config.recipes import catalogue_names
from lightspan.config.resolve import resolve

SCALE = [name for name in catalogue_names() if name.startswith("merging/") and name.endswith("_clip")]
# The network alone is smaller here, since every test has seconds: `lightspan plan RECIPE -c scale/stand_ins_clip` as it
# is takes 13 GiB.
SMALL = [f"model.init_args.backbone.init_args.{key}" for key in ("embed_dim=32", "depth=1", "num_heads=2")]


def test_there_are_recipes_at_the_papers_scale() -> None:
    assert len(SCALE) == 4
    for name in SCALE:
        backbone = resolve(name).config["model"]["init_args"]["backbone"]["init_args"]
        assert (backbone["embed_dim"], backbone["depth"], backbone["patch_size"]) == (768, 12, 32)
        assert len(resolve(name).config["data"]["init_args"]["tasks"]) == 8


@pytest.mark.runs
@pytest.mark.parametrize("name", SCALE)
def test_a_recipe_at_the_papers_scale_is_planned_with_stand_ins(name: str, capsys: Any) -> None:
    assert main(["check", name]) == 0
    assert main(["plan", name, "-c", "scale/stand_ins_clip", "data.init_args.batch_size=2", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "optimiser state" in said
    assert "counted by a real step" not in said
