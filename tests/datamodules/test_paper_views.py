"""Views of recipes at the scale of their papers, on a photograph that is not square: crops as the papers cut them."""

import importlib
from typing import Any

import pytest
import torch
from shipped_recipes import CONFIGS
from torchvision.transforms.v2 import RandomResizedCrop

from lightspan.datamodules.image.augment.rendering import pixel_box
from lightspan.datamodules.image.augment.views import MultiCrop, NestedCrops, RandomViews, Views
from lightspan.datamodules.image.variants.turns import QuarterTurns

HEIGHT, WIDTH, DRAWS = 375, 500, 300  # the most frequent size of ImageNet-1k
RATIO = (3 / 4, 4 / 3)
"""Width over height, of all these papers."""
FITS = 0.75**2
"""Share of the photograph's area up to which a crop of each ratio fits. Torchvision draws one that does not again, and
here it becomes the largest that does."""

PAPERS = {
    "clustering/swav_imagenet": 2 * [(224, 0.14, 1.0)] + 6 * [(96, 0.05, 0.14)],
    "contrastive/lejepa_imagenet": 2 * [(224, 0.3, 1.0)] + 6 * [(96, 0.05, 0.3)],
    "contrastive/moco_imagenet": 2 * [(224, 0.2, 1.0)],
    "contrastive/moco_v3_imagenet": 2 * [(224, 0.08, 1.0)],
    "contrastive/simclr_imagenet": 2 * [(224, 0.08, 1.0)],
    "contrastive/vicreg_imagenet": 2 * [(224, 0.08, 1.0)],
    "distillation/byol_imagenet": 2 * [(224, 0.08, 1.0)],
    "distillation/dino_imagenet": 2 * [(224, 0.25, 1.0)] + 10 * [(96, 0.05, 0.25)],
    "distillation/dinov2_imagenet": 2 * [(224, 0.32, 1.0)] + 8 * [(96, 0.05, 0.32)],
    "distillation/ibot_imagenet": 2 * [(224, 0.25, 1.0)] + 10 * [(96, 0.05, 0.25)],
    "distillation/poa_imagenet": 2 * [(224, 0.32, 1.0)] + 8 * [(96, 0.05, 0.32)],
    "masked/i_jepa_imagenet": [(224, 0.3, 1.0)],
    "masked/mae_imagenet": [(224, 0.2, 1.0)],
    "masked/sit_imagenet": 2 * [(224, 0.2, 1.0)],
    "masked/spark_imagenet": [(224, 0.67, 1.0)],
}
"""Sides in pixels, and least and most area of the crops, as the papers or their authors' code have them."""


def found() -> dict[str, dict[str, Any]]:
    """Settings of the views of each recipe that cuts crops out of images that come as shards."""
    settings = {name: config["data"].get("init_args", {}) for name, config in CONFIGS.items() if "data" in config}
    return {
        name: given["views"]
        for name, given in settings.items()
        if "RandomViews" in str(given.get("views")) and "shards" in given
    }


RECIPES = found()


def made(settings: Any) -> Any:
    """What a recipe's class paths stand for."""
    if isinstance(settings, list):
        return [made(one) for one in settings]
    if not isinstance(settings, dict) or "class_path" not in settings:
        return settings
    module, _, name = settings["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**made_values(settings.get("init_args", {})))


def made_values(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: made(value) for name, value in settings.items()}


def crops(views: Views) -> list[RandomViews]:
    """Whose crops are cut out of the whole image, one for each view."""
    if isinstance(views, MultiCrop):
        return [one for part in views.parts for one in crops(part)]
    if isinstance(views, QuarterTurns):
        return crops(views.views)
    if isinstance(views, NestedCrops):
        return crops(views.outer)
    assert isinstance(views, RandomViews)
    return [views] * views.count


def shapes(views: RandomViews) -> tuple[torch.Tensor, torch.Tensor]:
    """Width over height, and share of the image's area, of `DRAWS` crops."""
    drawn = [views.draw((3, HEIGHT, WIDTH))[0].parameters for _ in range(DRAWS)]
    high, wide = torch.tensor([pixel_box(parameters, HEIGHT, WIDTH)[2:] for parameters in drawn]).unbind(1)
    return wide / high, high * wide / (HEIGHT * WIDTH)


def ratios_of_torchvision(scale: tuple[float, float]) -> torch.Tensor:
    crop, image = RandomResizedCrop(224, scale, RATIO), torch.zeros(3, HEIGHT, WIDTH)
    drawn = [crop.make_params([image]) for _ in range(DRAWS)]
    return torch.tensor([given["width"] / given["height"] for given in drawn])


def test_the_recipes_are_found() -> None:
    assert PAPERS.keys() <= RECIPES.keys()
    assert len(RECIPES) >= 20


@pytest.mark.sample(13)
@pytest.mark.parametrize("name", RECIPES)
def test_crops_have_the_shapes_of_torchvisions_the_areas_of_the_paper_and_views_their_sizes(name: str) -> None:
    torch.manual_seed(0)
    views = made(RECIPES[name])
    of_image = crops(views)
    seen = views(torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8))
    assert all(view.isfinite().all() and view.min() >= 0 and view.max() <= 1 for view in seen)
    if name in PAPERS:
        assert [(*{*view.shape[1:]}, *crop.scale) for view, crop in zip(seen, of_image, strict=True)] == PAPERS[name]
    for crop in set(of_image):
        if crop.scale[0] > FITS:
            continue
        ratio, area = shapes(crop)
        for (least, most), numbers in ((RATIO, ratio), (crop.scale, area)):
            assert least * 0.97 < numbers.min() <= numbers.max() < most * 1.03  # of whole pixels
        expected = ratios_of_torchvision(crop.scale)
        torch.testing.assert_close(ratio.mean(), expected.mean(), rtol=0, atol=0.05)  # 4 deviations of the difference
        torch.testing.assert_close(ratio.std(), expected.std(), rtol=0.25, atol=0)
