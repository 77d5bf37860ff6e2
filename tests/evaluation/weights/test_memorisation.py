"""Memorised entries of feed-forward layers: norms that stream, rows that choose, a contrast, a vote and an edit."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.evaluation.weights.memorisation import (
    ColumnNorms,
    largest_control,
    memorised_entries,
    overlap,
    pixel_distances,
    prune,
    random_control,
    recorded,
    voted,
    wanda_scores,
)

OUT, HIDDEN = 7, 40


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cut", [(30,), (1, 29), (10, 0, 20), (7, 7, 7, 7, 2)])
def test_norms_of_batches_are_those_of_the_stacked_matrix(cut: tuple[int, ...]) -> None:
    x = noise(30, 4, HIDDEN)
    norms = ColumnNorms()
    for part in x.split(cut):
        norms.add(0, part)
    rows = x.flatten(0, 1).numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert norms.steps()[0].numpy() == pytest.approx(np.linalg.norm(rows, axis=0) / np.sqrt(len(rows)), abs=1e-12)


def test_a_set_of_more_prompts_has_no_larger_norms_and_no_token_outweighs_another() -> None:
    x = noise(5, HIDDEN)
    once, often = ColumnNorms(), ColumnNorms()
    once.add(0, x)
    often.add(0, torch.cat([x, 1e-30 * x, 1e200 * x]))
    assert torch.allclose(once.steps(), often.steps(), atol=1e-12)
    assert float(once.steps().square().sum()) == pytest.approx(1)


def test_steps_keep_their_own_norms_in_order() -> None:
    norms = ColumnNorms()
    for step in (2, 0, 2):
        norms.add(step, noise(3, HIDDEN, seed=step))
    zero = ColumnNorms()
    zero.add(0, noise(3, HIDDEN, seed=0))
    assert norms.steps().shape == (2, HIDDEN)
    assert torch.equal(norms.steps()[0], zero.steps()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_of_zeros_count_and_add_nothing(dtype: torch.dtype) -> None:
    x = noise(4, HIDDEN).to(dtype)
    x[2] = 0
    norms = ColumnNorms()
    norms.add(0, x)
    assert float(norms.steps().square().sum()) == pytest.approx(3 / 4, rel=1e-6)


def test_norms_are_taken_of_what_enters_the_named_layers_at_the_step_that_is_set() -> None:
    network = nn.Sequential(nn.Linear(5, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 3)).double()
    x = noise(2, 6, 5)
    with recorded(network, ["2"]) as recording:
        network(x)
        recording.enter(1)
        network(x)
    network(x)
    hidden = ColumnNorms()
    hidden.add(0, network[:2](x))
    steps = recording.norms["2"].steps()
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[:1], hidden.steps())


def test_every_row_chooses_the_whole_number_of_columns_below_the_share() -> None:
    weight, norms = noise(OUT, HIDDEN), noise(HIDDEN, seed=1).abs()
    for share, count in ((0.1, 4), (0.099, 3), (1.0, 40)):
        assert (memorised_entries(weight, norms, torch.zeros(HIDDEN), share).sum(dim=1) == count).all()
    chosen = memorised_entries(weight, norms, torch.zeros(HIDDEN), 0.1)
    scores = wanda_scores(weight, norms)
    for row in range(OUT):
        assert set(chosen[row].nonzero().flatten().tolist()) == set(np.argsort(-scores[row].numpy())[:4].tolist())


def test_scores_have_to_be_above_those_of_the_base() -> None:
    weight, target = noise(OUT, HIDDEN), noise(HIDDEN, seed=1).abs()
    base = target.clone()
    base[::2] = 0
    chosen = memorised_entries(weight, target, base, 0.25)
    assert chosen.any()
    assert not chosen[:, 1::2].any()
    assert not memorised_entries(weight, target, target, 1.0).any()
    assert not memorised_entries(torch.zeros(OUT, HIDDEN), target, base, 0.25).any()


def test_a_rows_scale_changes_nothing() -> None:
    weight, target, base = noise(OUT, HIDDEN), noise(HIDDEN, seed=1).abs(), noise(HIDDEN, seed=2).abs()
    scale = noise(OUT, 1, seed=3).abs() + 1e-3
    assert torch.equal(
        memorised_entries(weight, target, base, 0.2), memorised_entries(scale * weight, target, base, 0.2)
    )


def test_a_vote_counts_steps_and_0_is_the_union() -> None:
    chosen = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()[:, None]
    assert voted(chosen, 0.0).tolist() == [[True, True, True, False]]
    assert voted(chosen, 0.25).tolist() == [[True, True, False, False]]
    assert voted(chosen, 0.5).tolist() == [[True, False, False, False]]


def test_overlap_beside_that_of_independent_masks() -> None:
    first, second = torch.zeros(100).bool(), torch.zeros(100).bool()
    first[:40], second[20:60] = True, True
    iou, chance = overlap(first, second)
    assert iou == pytest.approx(20 / 60)
    assert chance == pytest.approx(0.16 / 0.64)
    assert overlap(first & False, second & False) == (0.0, 0.0)
    wide = torch.rand(2, 200_000, generator=torch.Generator().manual_seed(0))
    measured, expected = overlap(wide[0] < 0.3, wide[1] < 0.05)
    assert measured == pytest.approx(expected, rel=0.03)


def test_whole_columns_pruned_are_hidden_units_at_zero() -> None:
    network = nn.Sequential(nn.Linear(5, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 3)).double()
    gone = torch.zeros(HIDDEN).bool()
    gone[[3, 17]] = True
    x = noise(4, 5)
    expected = network[2](network[:2](x) * ~gone)
    prune(network, {"2.weight": (~gone).expand(3, HIDDEN)})
    assert torch.allclose(network(x), expected, atol=1e-12)
    assert (network[2].weight[:, gone] == 0).all()
    assert type(network[2].weight) is nn.Parameter


def test_an_infinite_weight_is_pruned_too_and_a_mask_of_another_network_changes_nothing() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(torch.inf)
    prune(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    assert layer.weight.tolist() == [[torch.inf, 0], [torch.inf, torch.inf]]
    before = layer.weight.clone()
    with pytest.raises(UserError, match=r"the mask of head\.weight is \[2, 2\], and Linear has none of that name"):
        prune(layer, {"weight": torch.zeros(2, 2).bool(), "head.weight": torch.zeros(2, 2).bool()})
    with pytest.raises(UserError, match=r"mask of weight is \[3, 2\], and Linear has \[2, 2\]; take a mask"):
        prune(layer, {"weight": torch.zeros(3, 2).bool()})
    assert torch.equal(layer.weight, before)


def test_controls_prune_as_many_entries() -> None:
    weight = noise(OUT, HIDDEN)
    chosen = weight > 1
    random = random_control(chosen, torch.Generator().manual_seed(0))
    largest = largest_control(chosen, weight)
    assert random.sum() == largest.sum() == chosen.sum()
    assert weight.abs()[largest].min() >= weight.abs()[~largest].max()
    assert not torch.equal(random, random_control(chosen, torch.Generator().manual_seed(1)))


def test_the_distance_of_pixels_knows_no_size_and_a_copy_has_none() -> None:
    for size in (1, 50, 4000):
        x = 1e6 * noise(3, size)
        apart = pixel_distances(x, torch.cat([x + 0.125, x[:1]]))
        assert apart.shape == (3, 4)
        assert apart[:, :3].diagonal().tolist() == pytest.approx([0.125] * 3, rel=1e-6)
        assert apart[0, 3] == 0
