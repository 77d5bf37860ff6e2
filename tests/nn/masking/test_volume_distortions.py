"""Distortions of volumes: curves at their ends and on the diagonal, windows that keep their voxels, boxes of noise."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.masking.volume_distortions import VolumeDistortions, along_curves, shuffled

OFF = {"shuffle": 0.0, "curve": 0.0, "paint": 0.0}


def volumes(rows: int = 3, sides: tuple[int, ...] = (12, 14, 21), channels: int = 1) -> Tensor:
    return torch.rand(rows, channels, *sides, generator=torch.Generator().manual_seed(1))


def test_a_curve_with_its_points_on_the_diagonal_is_the_identity_and_mirrored_one_minus_it() -> None:
    volume = volumes(4)
    control = torch.tensor(
        [[1 / 3, 1 / 3, 2 / 3, 2 / 3, 0.0], [0.9, 0.9, 0.1, 0.1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    )
    found = along_curves(volume, control)
    torch.testing.assert_close(found[:3], volume[:3], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[3], 1 - volume[3], atol=1e-5, rtol=0)


def test_curves_are_monotone_maps_of_0_and_1_to_0_and_1_and_those_of_the_cubic_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.linspace(0, 1, 501).view(1, 1, -1, 1, 1).expand(20, -1, -1, -1, -1)
    control = torch.rand(20, 5, generator=generator)
    control[:, 4] = torch.arange(20) % 2
    found = along_curves(line, control)[:, 0, :, 0, 0]
    rises = 1 - 2 * control[:, 4:]
    assert (found.diff(dim=1) * rises >= 0).all()
    torch.testing.assert_close(found[:, 0], control[:, 4])
    torch.testing.assert_close(found[:, -1], 1 - control[:, 4])
    for row, (x1, y1, x2, y2, falls) in zip(found.double().numpy(), control.double().tolist(), strict=True):
        for number in (50, 250, 333):
            roots = np.roots([1 + 3 * x1 - 3 * x2, 3 * x2 - 6 * x1, 3 * x1, -number / 500])
            s = float(next(root.real for root in roots if abs(root.imag) < 1e-9 and -1e-9 <= root.real <= 1 + 1e-9))
            t = 1 - s if falls else s
            assert row[number] == pytest.approx(3 * (1 - t) ** 2 * t * y1 + 3 * (1 - t) * t**2 * y2 + t**3, abs=2e-3)


def test_what_lies_outside_of_0_to_1_counts_as_its_end() -> None:
    given, control = torch.tensor([-3.0, 2.0]).view(1, 1, 2, 1, 1), torch.tensor([[0.2, 0.9, 0.4, 0.1, 0.0]])
    assert along_curves(given, control).flatten().tolist() == [0, 1]
    assert along_curves(given.bfloat16(), control).dtype == torch.bfloat16


def test_shuffling_keeps_the_voxels_of_every_window_and_channels_together() -> None:
    volume = volumes(2, (5, 6, 7), channels=2)
    volume[:, 1] = 2 * volume[:, 0]
    edges, corners = torch.tensor([[2, 3, 4], [1, 1, 1]]), torch.tensor([[1, 0, 2], [0, 0, 0]])
    found = shuffled(volume, edges, corners, torch.tensor([5, 6]))
    assert torch.equal(found[:, 1], 2 * found[:, 0])
    assert torch.equal(found[1], volume[1])
    moved = found[0] != volume[0]
    assert moved.float().mean() > 0.8
    starts = [range(-corner, side, edge) for corner, side, edge in zip((1, 0, 2), (5, 6, 7), (2, 3, 4), strict=True)]
    for corner in np.array(np.meshgrid(*starts)).reshape(3, -1).T:
        window = tuple(slice(max(at, 0), at + edge) for at, edge in zip(corner.tolist(), (2, 3, 4), strict=True))
        before, after = (x[0, 0][window].flatten().sort().values for x in (volume, found))
        assert torch.equal(before, after), corner


def test_all_orders_of_a_window_are_equally_likely() -> None:
    rows = 6000
    volume = torch.tensor([0.0, 1, 2]).view(1, 1, 3, 1, 1).expand(rows, -1, -1, -1, -1)
    edges, corners = torch.tensor([[3, 1, 1]]).expand(rows, -1), torch.zeros(rows, 3, dtype=torch.int64)
    found = shuffled(volume, edges, corners, torch.arange(rows)).view(rows, 3)
    counts = torch.bincount((found @ torch.tensor([9.0, 3, 1])).long(), minlength=27)
    assert (counts > 0).sum() == 6
    assert ((counts[counts > 0] - 1000).abs() < 120).all()


def test_painting_inside_leaves_all_but_boxes_bit_equal() -> None:
    volume = volumes(40)
    found = VolumeDistortions(**OFF | {"paint": 1.0}, outside=0.0)(volume, 3, range(40))
    noise = (found != volume)[:, 0]
    share = noise.flatten(1).float().mean(dim=1)
    assert share.max() <= 5 / 27
    assert (share > 0).float().mean() > 0.8
    for axis in (1, 2, 3):  # faces stay
        assert not noise.movedim(axis, 0)[[0, 1, 2, -1, -2, -3]].any()
    assert ((found >= 0) & (found < 1)).all()


def test_painting_outside_keeps_at_least_a_box_of_three_sevenths_a_side() -> None:
    volume = volumes(40)
    found = VolumeDistortions(**OFF | {"paint": 1.0}, outside=1.0)(volume, 3, range(40))
    kept = (found == volume)[:, 0]
    least = [side - 4 * side // 7 for side in volume.shape[2:]]
    assert (kept.flatten(1).sum(dim=1) >= np.prod(least)).all()
    assert (kept.flatten(1).float().mean(dim=1) < 0.8).all()
    for one in kept[:5]:
        assert any(
            one[d : d + least[0], h : h + least[1], w : w + least[2]].all()
            for d in range(12 - least[0] + 1) for h in range(14 - least[1] + 1) for w in range(21 - least[2] + 1)
        )  # fmt: skip


def test_nothing_that_is_off_changes_a_volume_and_each_draw_is_a_function_of_its_number() -> None:
    volume, made = volumes(4), VolumeDistortions(seed=7)
    assert torch.equal(VolumeDistortions(**OFF)(volume, 0, range(4)), volume)
    whole = made(volume, 5, [8, 3, 9, 4])
    torch.testing.assert_close(made(volume[2:], 5, [9, 4]), whole[2:])
    assert not torch.equal(made(volume, 6, [8, 3, 9, 4]), whole)
    assert made(volume[:0], 5, []).shape == (0, *volume.shape[1:])
    flat = made(volume[0, :, :, 0, 0][:, None, :, None, None][[0] * 3], 0, range(3))
    assert flat.isfinite().all()
    assert made(torch.zeros(2, 1, 1, 1, 1, dtype=torch.bfloat16), 0, range(2)).isfinite().all()


def test_settings_outside_of_their_ranges_are_refused() -> None:
    for name in ("shuffle", "curve", "paint", "outside", "window", "falling", "seed"):
        with pytest.raises(UserError, match=name):
            VolumeDistortions(**{name: -1})  # type: ignore[arg-type]
