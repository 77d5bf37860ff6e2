"""Prompt segmentation: maps, IoU and pairs against plain loops, their limits, and degenerate images."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.dense.prompt_masks import (
    best_iou_of_grid,
    iou,
    object_similarities,
    objects_of_patches,
    prompt_ious,
    prompt_maps,
)

GRID = (3, 4)


def patches(seed: int = 0) -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))


def objects() -> Tensor:
    """Two objects in 6 x 8 pixels: patches of 2 x 2 that they cover whole, in part, and not."""
    drawn = torch.zeros(6, 8, dtype=torch.int64)
    drawn[:4, :4], drawn[3:, 5:] = 1, 2
    return drawn


def test_a_map_is_one_at_its_prompt_and_a_cosine_everywhere() -> None:
    maps = prompt_maps(patches())
    torch.testing.assert_close(maps.diagonal(), torch.ones(12))
    assert maps.abs().max() <= 1
    torch.testing.assert_close(maps[2, 5], torch.cosine_similarity(patches()[2], patches()[5], dim=0))
    assert prompt_maps(torch.zeros(3, 2)).abs().max() == 0


def test_iou_is_that_of_sets_of_pixels() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 7, 4, 5)) < 0.5
    for x, y, found in zip(a, b, iou(torch.from_numpy(a), torch.from_numpy(b)), strict=True):
        first, second = ({tuple(p) for p in np.argwhere(mask)} for mask in (x, y))
        assert found.item() == pytest.approx(len(first & second) / len(first | second))
    empty = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert iou(empty, empty).item() == 1


def test_a_patch_is_of_the_object_that_covers_more_than_half_of_it() -> None:
    expected = [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2]
    found = objects_of_patches(objects(), GRID)
    # Row 1, column 3 has two of four pixels of object 2, which is not more than half; row 2, column 2 likewise.
    assert found.tolist() == expected
    with pytest.raises(UserError, match="a grid of 4 x 4 patches does not fill 6 x 8 pixels"):
        objects_of_patches(objects(), (4, 4))


def test_below_minus_one_all_pixels_are_chosen_and_above_one_none() -> None:
    low, high = prompt_ious(patches(), objects(), GRID, [-1.5, 1.5]).tolist()
    areas = {1: 16 / 48, 2: 9 / 48}
    prompts = [1, 1, 1, 1, 2]
    assert low == pytest.approx(sum(areas[number] for number in prompts) / 5)
    assert high == 0


def test_features_that_are_their_objects_reach_what_whole_patches_can() -> None:
    """Nearest to the map, since a bilinear one is a little blurred at the borders."""
    drawn = torch.zeros(6, 8, dtype=torch.int64)
    drawn[:2, :4], drawn[4:, 4:] = 1, 2
    features = torch.eye(3)[objects_of_patches(drawn, GRID)]
    assert prompt_ious(features, drawn, GRID, [0.5]).item() == pytest.approx(1.0)
    assert best_iou_of_grid(drawn, GRID) == 1
    assert best_iou_of_grid(objects(), GRID) == pytest.approx((4 * 1.0 + 4 / 9) / 5)


def test_pairs_are_those_of_a_double_loop_and_auc_is_that_of_scikit_learn() -> None:
    object_P = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1, 3, 0, 2, 1])
    found, x = object_similarities(patches(), object_P), patches()
    intra, inter = list[float](), list[float]()
    for i in range(12):
        for j in range(i + 1, 12):
            if object_P[i] and object_P[j]:
                cosine = float(torch.cosine_similarity(x[i], x[j], dim=0))
                (intra if object_P[i] == object_P[j] else inter).append(cosine)
    torch.testing.assert_close(found.intra.sort().values, torch.tensor(sorted(intra)))
    torch.testing.assert_close(found.inter.sort().values, torch.tensor(sorted(inter)))
    truth = [1] * len(intra) + [0] * len(inter)
    assert found.auc() == pytest.approx(roc_auc_score(truth, intra + inter))
    tied = found._replace(intra=found.intra.round(), inter=found.inter.round())
    assert tied.auc() == pytest.approx(roc_auc_score(truth, torch.cat([*tied]).numpy()))


def test_random_features_cannot_tell_pairs_and_equal_histograms_overlap_whole() -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    found = object_similarities(x, torch.arange(300) % 3 + 1)
    assert found.auc() == pytest.approx(0.5, abs=0.02)
    assert found.overlap(10) > 0.95
    assert found._replace(inter=found.intra).overlap() == pytest.approx(1.0)
    assert found._replace(intra=torch.ones(4), inter=-torch.ones(3)).overlap() == 0


def test_an_image_without_objects_or_with_one_has_no_figure() -> None:
    nothing = torch.zeros(6, 8, dtype=torch.int64)
    assert prompt_ious(patches(), nothing, GRID, [0.0]).isnan().all()
    assert math.isnan(best_iou_of_grid(nothing, GRID))
    for numbers in (torch.zeros(12, dtype=torch.int64), torch.ones(12, dtype=torch.int64)):
        found = object_similarities(patches(), numbers)
        assert math.isnan(found.auc())
        assert math.isnan(found.overlap())
    assert prompt_ious(torch.zeros(12, 3).bfloat16(), objects(), GRID, [-0.5]).isfinite().all()
    with pytest.raises(UserError, match="12 patches are not a grid of 3 x 3"):
        prompt_ious(patches(), objects(), (3, 3), [0.0])
