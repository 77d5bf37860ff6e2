"""Alterations of volumes: exact where they are permutations, labels that follow, equal rows on any number of ranks."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.volume.augment import Alteration, AlteredVolumes, VolumeAugmentation, bits, thickened

STILL = Alteration(*[0.0] * 7, 1.0, *[0.0] * 4, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
ALL = VolumeAugmentation((0.5, 0.5, 0.5), 0.5, 20, 0.2, 2, 1.5, 4, 3.0, 0.2, 0.3, 0.1, 0.3, 0.1)


def altered(volume: torch.Tensor, labels: torch.Tensor, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = bits([STILL._replace(**changes)])[None].expand(len(volume), -1, -1)
    batch = {
        "volume": volume,
        "segmentation": labels,
        "spacing": torch.tensor([[3.0, 1, 1]]).expand(len(volume), 3),
        "present": torch.ones(volume.shape[:2], dtype=torch.bool),
        "seed": torch.arange(len(volume)),
    }
    made = AlteredVolumes(ALL)({**batch, "drawn": drawn})
    assert torch.equal(made["parameters"], drawn.view(torch.float32))
    return made["volume"], made["segmentation"]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 5, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    return labels[:, None].float(), labels


def test_reversals_turns_and_shifts_are_permutations(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    volume, labels = pair
    exact = {
        (): labels,
        (("flip_d", 1),): labels.flip(1),
        (("flip_h", 1), ("flip_w", 1)): labels.flip(2, 3),
        (("turns", 1),): labels.rot90(1, (2, 3)),
        (("turns", 2),): labels.rot90(2, (2, 3)),
        (("turns", 3),): labels.rot90(3, (2, 3)),
    }
    for changes, wanted in exact.items():
        moved, moved_labels = altered(volume, labels, **dict(changes))
        assert torch.equal(moved_labels, wanted), changes
        torch.testing.assert_close(moved[:, 0], wanted.float(), atol=1e-4, rtol=0)
    moved, moved_labels = altered(volume, labels, shift_w=2.0)
    assert torch.equal(moved_labels[..., :4], labels[..., 2:])
    assert (moved_labels[..., 4:] == -1).all()
    assert moved[..., 4:].abs().max() < 1e-4


def test_a_turn_by_90_degrees_is_one_in_millimetres(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    volume, labels = pair
    turned = [altered(volume, labels, angle_d=angle)[1] for angle in (90.0, -90.0)]  # the plane of H and W is isotropic
    assert any(torch.equal(one, labels.rot90(1, (2, 3))) for one in turned)
    tall = torch.zeros(1, 7, 21, 5, dtype=torch.long)
    tall[:, :, 10, 2] = 1  # a line along D, 7 voxels of 3 mm
    _, laid = altered(tall[:, None].float(), tall, angle_w=90.0)
    assert (laid[0, 3, :, 2] == 1).sum() == 21  # 21 voxels of 1 mm along H


def test_zoom_and_intensity(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    volume, labels = pair
    blob = torch.zeros(1, 9, 9, 9, dtype=torch.long)
    blob[:, 3:6, 3:6, 3:6] = 1
    assert altered(blob[:, None].float(), blob, zoom=2.0)[1].sum() > 4 * 27
    changed, same = altered(volume, labels, gain=2.0, offset=1.0, gamma=2.0)
    assert torch.equal(same, labels)
    torch.testing.assert_close(changed, 2 * volume**2 + 1, atol=1e-3, rtol=1e-4)


def test_a_scan_of_thick_slices_has_every_second_one_and_lines_between_them() -> None:
    volume = torch.rand(2, 1, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    thick = thickened(volume, torch.tensor([1.0, 2.0]), 2)
    assert torch.equal(thick[0], volume[0])
    assert torch.equal(thick[1, :, ::2], volume[1, :, ::2])
    torch.testing.assert_close(thick[1, :, 1::2], (volume[1, :, :-1:2] + volume[1, :, 2::2]) / 2)
    coarse = thickened(volume, torch.tensor([9.0, 9.0]), 4)  # longer than the volume: from the first to the last voxel
    torch.testing.assert_close(coarse, torch.lerp(volume[..., :1], volume[..., -1:], torch.arange(3) / 9))
    assert thickened(volume.bfloat16(), torch.tensor([2.0, 3.0]), 3).dtype == torch.bfloat16


def test_a_bias_field_is_a_smooth_positive_factor_and_noise_is_as_large_as_drawn() -> None:
    flat, labels = torch.ones(2, 1, 12, 12, 12), torch.zeros(2, 12, 12, 12, dtype=torch.long)
    field = altered(flat, labels, bias=0.2)[0]
    assert (field > 0).all()
    assert 0.05 < field.log().std() < 0.25
    for axis in (2, 3, 4):  # linear between four points: no step is as large as the field
        assert field.log().diff(dim=axis).abs().max() < 0.35
    assert not torch.equal(field[0], field[1])
    grain = altered(flat, labels, noise=0.1)[0] - 1
    assert abs(grain.std() - 0.1) < 0.01
    assert abs(grain.mean()) < 0.01


def test_a_row_is_a_function_of_its_seed_alone() -> None:
    drawn = [ALL.draw(np.random.default_rng(number)) for number in range(4)]
    volume, spacing = torch.rand(4, 2, 6, 8, 8), torch.ones(4, 3)
    present = torch.tensor([[True, True], [True, False]] * 2)
    batch = {
        "views": [volume, volume.flip(2)],
        "spacing": spacing,
        "present": present,
        "seed": torch.arange(4),
        "drawn": bits(drawn)[:, None].expand(-1, 2, -1),
    }
    whole = AlteredVolumes(ALL)(batch)
    half = AlteredVolumes(ALL)(
        {name: [x[2:] for x in v] if isinstance(v, list) else v[2:] for name, v in batch.items()}
    )
    for one, part in zip(whole["views"], half["views"], strict=True):
        torch.testing.assert_close(one[2:], part)
        assert not one[~present].any()
        assert one.isfinite().all()
    assert not torch.allclose(whole["views"][0], whole["views"][1].flip(2))  # crops bend each in its own way
    names = Alteration._fields
    bounds = dict(zip(names, zip(*drawn, strict=True), strict=True))
    assert all(0.8 <= x <= 1.2 for x in bounds["zoom"])
    assert all(x in (0, 1, 2, 3) for x in bounds["turns"])
    thick = [bounds[f"thick_{axis}"] for axis in "dhw"]
    assert all(sum(x > 1 for x in one) == 1 and max(one) <= 3 for one in zip(*thick, strict=True))
    assert all(0 < x <= 0.2 for x in bounds["bias"])


def test_by_default_nothing_changes() -> None:
    none, volume = VolumeAugmentation(), torch.rand(1, 1, 3, 4, 5)
    assert none.draw(np.random.default_rng(0)) == STILL
    a = Alteration(*(torch.tensor([x]) for x in STILL))
    same, grid = none.altered(volume, a, torch.ones(1, 3), torch.zeros(1, dtype=torch.long), 0)
    assert torch.equal(same, volume)
    assert grid is None
    for settings in ({"flip": (0.5, 2, 0)}, {"scale": 1.0}, {"points": 1}, {"degrees": -1}, {"elastic": float("inf")},
                     {"anisotropy": 0.5}, {"bias": -1.0}, {"noise": float("nan")}):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(settings))):
            VolumeAugmentation(**settings)
