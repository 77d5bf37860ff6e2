"""Pretext tasks: exact turns and tiles, labels that fit them, and draws that any rank repeats."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Plain, RandomViews, seeded
from lightspan.datamodules.image.variants.turns import QuarterTurns
from lightspan.nn.pretext import Jigsaw, QuarterTurn, far_permutations, tiles_of


def images(count: int = 4, side: int = 9, channels: int = 2) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_turned_views_are_exact_turns_before_they_are_changed() -> None:
    image = images(1, channels=1)[0]
    turned = QuarterTurns(Plain(1))(image)
    assert len(turned) == 4
    assert torch.equal(turned[0], image)
    for k in range(1, 4):
        assert torch.equal(turned[k], torch.rot90(image, k, (1, 2)))
    assert torch.equal(turned[1][:, 0, 0], image[:, 0, -1])  # a quarter against the clock
    changed = RandomViews(count=1)
    with seeded(3):
        views = QuarterTurns(changed)(image)
    with seeded(3):
        expected = [changed(torch.rot90(image, k, (1, 2)))[0] for k in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


def test_turned_views_that_differ_in_size_or_are_not_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"must give one view of one size, and give \[2, 2, 2, 2\]"):
        QuarterTurns(Plain(2))(images(1)[0])
    wide = torch.rand(1, 6, 8)
    with pytest.raises(UserError, match=r"\[\[6, 8\], \[8, 6\], \[6, 8\], \[8, 6\]\]"):
        QuarterTurns(Plain(1))(wide)
    assert len(QuarterTurns(RandomViews(count=1, size=6))(wide)) == 4


def test_a_turn_is_guessed_for_every_view_in_their_order() -> None:
    task, x = QuarterTurn(8, hidden=(6, 5)).eval(), images()
    seen: list[Tensor] = []

    def backbone(x_BCHW: Tensor) -> Tensor:
        seen.append(x_BCHW)
        return x_BCHW.flatten(1)[:, :8]

    views = [torch.rot90(x, k, (2, 3)) for k in range(4)]
    guess = task(backbone, views, torch.arange(4), step=0)
    assert torch.equal(seen[0], torch.cat(views))
    assert guess.label_R.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert guess.logits_RK.shape == (16, 4)
    with pytest.raises(UserError, match=r"turned views have sizes .* and need one size"):
        task(backbone, [*views[:3], views[3][..., :4]], torch.arange(4), 0)


def test_tiles_put_back_are_the_image_and_what_is_left_over_is_cut_off() -> None:
    x = images(2, side=10)
    tiles = tiles_of(x, 3)
    assert tiles.shape == (2, 9, 2, 3, 3)
    rows = [torch.cat([tiles[:, 3 * i + j] for j in range(3)], dim=3) for i in range(3)]
    assert torch.equal(torch.cat(rows, dim=2), x[..., :9, :9])
    with pytest.raises(UserError, match=r"images of \[2, 2\] pixels have no 3 x 3 tiles"):
        tiles_of(images(side=2), 3)


def test_a_jigsaw_shows_the_tiles_in_the_order_that_is_to_be_guessed() -> None:
    torch.manual_seed(0)
    task, x, index = Jigsaw(18, permutations=5, tile_features=3, hidden=4, seed=2), images(), torch.tensor([7, 3, 9, 1])
    seen: list[Tensor] = []

    def backbone(x_BCHW: Tensor) -> Tensor:
        seen.append(x_BCHW)
        return torch.nn.functional.adaptive_avg_pool2d(x_BCHW, 3).flatten(1)

    guess = task(backbone, [x], index, step=6)
    assert guess.logits_RK.shape == (4, 5)
    assert torch.equal(guess.label_R, task.drawn(index, 6))
    tiles = tiles_of(x, 3)
    shown = seen[0].view(4, 9, 2, 9, 9)
    for b in range(4):
        for place, tile in enumerate(task.permutation_KT[guess.label_R[b]]):
            resized = torch.nn.functional.interpolate(tiles[b, tile][None], size=(9, 9), mode="bilinear")[0]
            torch.testing.assert_close(shown[b, place], resized)


def test_both_heads_drop_half_of_both_hidden_layers() -> None:
    """As in vkinakh/scatsimclr, src/trainer/pretext_task_trainer.py."""
    for task in (Jigsaw(4, tile_features=8, hidden=6), QuarterTurn(4, (8, 6))):
        layers = [each for each in task.modules() if isinstance(each, nn.Linear | nn.ReLU | nn.Dropout)]
        assert [type(each) for each in layers] == [nn.Linear, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]
        assert [each.p for each in layers if isinstance(each, nn.Dropout)] == [0.5, 0.5]
        with pytest.raises(UserError, match=r"dropout=1\.5"):
            type(task)(4, dropout=1.5)


def test_draws_are_a_function_of_seed_step_and_index_and_not_of_the_batch() -> None:
    task, index = Jigsaw(4, permutations=35, tile_features=2, hidden=2, seed=1), torch.arange(40)
    whole = task.drawn(index, 3)
    parts = torch.cat([task.drawn(index[:13], 3), task.drawn(index[13:], 3)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, task.drawn(index, 4))
    assert len(whole.unique()) > 15
    assert task.drawn(index[:0], 3).shape == (0,)


@pytest.mark.parametrize("seed", [0, 1])
def test_permutations_are_distinct_and_far_from_one_another(seed: int) -> None:
    table = far_permutations(35, 9, seed)
    assert table.shape == (35, 9)
    assert (np.sort(table, axis=1) == np.arange(9)).all()
    apart = [(table[i] != table[j]).sum() for i in range(35) for j in range(i)]
    assert min(apart) >= 6
    assert (far_permutations(35, 9, seed) == table).all()


def test_more_permutations_than_there_are_are_refused() -> None:
    assert len(far_permutations(6, 3, 0)) == 6
    with pytest.raises(UserError, match="no 7 different permutations of 3 things"):
        far_permutations(7, 3, 0)
    for count in (1, 5001):
        with pytest.raises(UserError, match=rf"permutations={count} must lie in \[2, 5000\]"):
            Jigsaw(4, permutations=count)
