"""Changes of packed clouds: against one cloud at a time, and what each keeps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.points.augment import (
    ChangedPoints,
    PointAugmentation,
    bits,
    cropped,
    jittered,
    turned,
    unit_sphere,
)

OFFSETS = torch.tensor([0, 4, 4, 5, 12])


def points(seed: int = 0) -> Tensor:
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))


def batch(augmentation: PointAugmentation, seed: int = 3) -> dict[str, Tensor]:
    drawn = torch.stack([bits(augmentation.draw(np.random.default_rng(seed + n))) for n in range(4)])
    fields = {"normal": torch.nn.functional.normalize(points(1)), "colour": points(2).sigmoid()}
    return {
        "xyz": points(),
        "offsets": OFFSETS,
        **fields,
        "drawn": drawn,
        "seed": torch.arange(4),
        "index": torch.arange(4),
    }


def test_turns_are_matrices_of_each_cloud() -> None:
    quarter = torch.tensor([[0.0, 0, 90], [90, 0, 0], [0, 90, 0], [90, 0, 90]])
    x, y, z = points().unbind(1)
    found = turned(points(), OFFSETS, quarter)
    for rows, expected in ((slice(0, 4), (-y, x, z)), (slice(4, 5), (z, y, -x)), (slice(5, 12), (z, x, y))):
        torch.testing.assert_close(found[rows], torch.stack(expected, 1)[rows])


def test_a_crop_keeps_the_points_farthest_along_its_direction() -> None:
    side = torch.tensor([[1.0, 0, 0]] * 4)
    keeps = cropped(points(), OFFSETS, side, torch.tensor([0.5, 0.5, 0.01, 0.72]))
    for first, end, count in ((0, 4, 2), (4, 5, 1), (5, 12, 6)):
        along, kept = points()[first:end, 0], keeps[first:end]
        assert int(kept.sum()) == count
        assert along[kept].min() >= (along[~kept].max() if (~kept).any() else -9)
    assert cropped(points(), OFFSETS, side, torch.ones(4)).all()


def test_the_unit_sphere_is_about_the_mean_and_touched() -> None:
    for scale in (1.0, 1e-30, 1e12):
        found = unit_sphere(points() * scale + scale, OFFSETS)
        for first, end in ((0, 4), (5, 12)):
            torch.testing.assert_close(found[first:end].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
            torch.testing.assert_close(found[first:end].norm(dim=1).max(), torch.tensor(1.0))
        assert not found[4:5].any()
    assert not unit_sphere(torch.full((12, 3), 7.0), OFFSETS).any()
    assert unit_sphere(points().bfloat16(), OFFSETS).isfinite().all()


def test_jitter_follows_from_seed_and_place_alone_and_is_cut_off() -> None:
    moved = jittered(points(), OFFSETS, torch.arange(4), 0.1, 0.15) - points()
    assert moved.abs().max() <= 0.15 + 1e-6
    assert moved.abs().min() > 0
    alone = jittered(points()[5:], torch.tensor([0, 7]), torch.tensor([3]), 0.1, 0.15) - points()[5:]
    torch.testing.assert_close(moved[5:], alone)
    wide = jittered(torch.zeros(9000, 3), torch.tensor([0, 9000]), torch.tensor([1]), 1.0, 9.0)
    assert abs(float(wide.std()) - 1) < 0.02


def test_without_settings_nothing_changes() -> None:
    given = batch(PointAugmentation())
    found = ChangedPoints(PointAugmentation())(given)
    for name in ("xyz", "normal", "colour"):
        torch.testing.assert_close(found[name], given[name])
    assert {"drawn", "seed"} & found.keys() == set()
    assert found["parameters"].shape == (4, 13)


def test_all_fields_of_a_crop_stay_together_and_normals_stay_at_right_angles() -> None:
    augmentation = PointAugmentation(keep=0.3, degrees=(180, 180, 180), scale=(0.5, 2), shift=1, jitter=0)
    given = batch(augmentation)
    along = torch.linalg.cross(given["normal"], points(7))  # in the plane of each normal
    found, ends = ChangedPoints(augmentation)(given), ChangedPoints(augmentation)({**given, "xyz": given["xyz"]})
    assert torch.equal(found["xyz"], ends["xyz"])
    counts = found["offsets"].diff()
    assert (counts <= OFFSETS.diff()).all()
    assert counts.tolist() != OFFSETS.diff().tolist()
    assert len(found["xyz"]) == len(found["normal"]) == len(found["colour"]) == int(counts.sum())
    whole = PointAugmentation(degrees=(180, 180, 180), scale=(0.5, 2), shift=1)
    given = batch(whole)
    one, other = (ChangedPoints(whole)({**given, "xyz": given["xyz"] + step}) for step in (0 * along, along))
    apart = ((other["xyz"] - one["xyz"]) * one["normal"]).sum(1)
    torch.testing.assert_close(apart, torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(one["normal"].norm(dim=1), torch.ones(12))


def test_settings_outside_their_range_are_refused() -> None:
    for name, value in (
        ("keep", 0.0),
        ("degrees", (0, 0, 200)),
        ("scale", (0, 1)),
        ("shift", -1),
        ("jitter", float("nan")),
    ):
        with pytest.raises(UserError, match=name):
            PointAugmentation(**{name: value})  # type: ignore[arg-type]
