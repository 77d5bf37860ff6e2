import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.batch_mix import BatchMix


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    """Pictures whose pixels say which row they are of."""
    image_BCHW = torch.arange(1.0, rows + 1).view(-1, 1, 1, 1).expand(rows, 3, 32, 24).clone()
    return image_BCHW, torch.arange(rows)


def test_mixup_adds_a_picture_and_its_mirror_in_the_batch_and_their_labels_in_the_same_shares() -> None:
    image, label = batch()
    mix = BatchMix(cutmix=0.0, smoothing=0.0)
    for step in range(5):
        mixed, target = mix(image, label, 6, step)
        share = np.random.default_rng((0, step)).beta(0.8, 0.8)
        torch.testing.assert_close(mixed, share * image + (1 - share) * image.flip(0))
        expected = torch.zeros(4, 6)
        for row in range(4):
            expected[row, row] += share
            expected[row, 3 - row] += 1 - share
        torch.testing.assert_close(target, expected)


def test_cutmix_pastes_a_box_and_labels_are_shares_of_the_pixels() -> None:
    image, label = batch()
    for step in range(20):
        mixed, target = BatchMix(mixup=0.0, smoothing=0.0)(image, label, 4, step)
        pasted = mixed != image
        assert torch.equal(mixed, torch.where(pasted, image.flip(0), image))
        assert torch.equal(pasted, pasted[:1, :1].expand_as(pasted))  # one box for all
        rows, columns = pasted[0, 0].any(dim=1).nonzero()[:, 0], pasted[0, 0].any(dim=0).nonzero()[:, 0]
        assert pasted.sum() == 12 * len(rows) * len(columns)
        share = pasted[0, 0].float().mean()
        torch.testing.assert_close(target, torch.eye(4) * (1 - share) + torch.eye(4).flip(0) * share)
    assert torch.equal(image, batch()[0])


def test_labels_are_smoothed_and_always_sum_to_one() -> None:
    image, label = batch(3)
    for step in range(10):
        _, target = BatchMix()(image, label, 5, step)
        torch.testing.assert_close(target.sum(dim=1), torch.ones(3))
        torch.testing.assert_close(target[:, 3:], torch.full((3, 2), 0.1 / 5))
        torch.testing.assert_close(target[1], 0.9 * torch.eye(5)[1] + 0.1 / 5)  # the middle is its own partner


def test_draws_are_a_function_of_seed_and_step_and_take_turns() -> None:
    image, label = batch()
    one, same, other = (BatchMix(seed=seed)(image, label, 4, 7)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    # What MixUp makes of whole numbers is none of them.
    cuts = [torch.isin(BatchMix()(image, label, 4, step)[0], image).all().item() for step in range(200)]
    assert 70 < sum(cuts) < 130


def test_a_batch_of_one_and_half_precision_stay_what_they_are() -> None:
    image, label = batch(1)
    for step in range(6):
        mixed, target = BatchMix(smoothing=0.0)(image, label, 2, step)
        torch.testing.assert_close(mixed, image)
        torch.testing.assert_close(target, torch.tensor([[1.0, 0.0]]))
    mixed, target = BatchMix()(image.bfloat16(), label, 2, 0)
    assert (mixed.dtype, target.dtype) == (torch.bfloat16, torch.float32)


def test_settings_out_of_range_are_named() -> None:
    for settings, said in (
        ({"mixup": -0.1}, "mixup="),
        ({"cutmix": float("inf")}, "cutmix="),
        ({"mixup": 0.0, "cutmix": 0.0}, "one of them"),
        ({"switch": 1.5}, "switch="),
        ({"smoothing": -1.0}, "smoothing="),
        ({"seed": -1}, "seed="),
    ):
        with pytest.raises(UserError, match=said):
            BatchMix(**settings)
