"""Guided masks: exact counts, odds by saliency, draws that follow seed, step and cloud, and what finer levels hide."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lightspan.core.errors import UserError
from lightspan.nn.masking.guided_masks import GuidedMasks, hidden_at_levels, require_hidden, seen_first
from lightspan.nn.points.groups import nested_groups

CLOUDS = torch.arange(2000)


@pytest.mark.parametrize("odds", ["power", "softmax"])
def test_of_equal_saliency_all_groups_stay_visible_equally_often_and_counts_are_exact(odds: str) -> None:
    for saliency in (torch.full((2000, 16), 0.05), torch.zeros(2000, 16), torch.full((2000, 16), torch.nan)):
        hidden = GuidedMasks(odds=odds).draw(saliency, 0, CLOUDS)  # type: ignore[arg-type]
        assert hidden.sum(1).unique().tolist() == [13]
        assert chisquare((~hidden).sum(0).numpy()).pvalue > 1e-3


def test_one_draw_has_odds_in_proportion_to_saliency_or_to_its_exponential() -> None:
    saliency = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for masks, odds in (
        (GuidedMasks(0.75), saliency),
        (GuidedMasks(0.75, temperature=0.5), saliency**2),
        (GuidedMasks(0.75, "softmax"), saliency.exp()),
        (GuidedMasks(0.75, "softmax", temperature=0.1), (10 * saliency).exp()),
        (GuidedMasks(0.75, temperature=math.inf), torch.ones(4).double()),
    ):
        seen = (~masks.draw(saliency.expand(2000, 4), 0, CLOUDS)).sum(0).numpy()
        assert chisquare(seen, 2000 * (odds / odds.sum()).numpy()).pvalue > 1e-3


def test_draws_without_replacement_are_those_of_torch_in_their_frequencies() -> None:
    saliency = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4])
    seen = (~GuidedMasks(0.6).draw(saliency.expand(20000, 5), 0, torch.arange(20000))).double().mean(0)
    drawn = saliency.expand(20000, 5).multinomial(2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen, drawn.flatten().bincount(minlength=5).double() / 20000, atol=0.015, rtol=0)


def test_what_alone_is_salient_always_stays() -> None:
    saliency = torch.zeros(2000, 16)
    saliency[:, [2, 5, 11]] = 0.3
    assert not GuidedMasks().draw(saliency, 0, CLOUDS)[:, [2, 5, 11]].any()


def test_draws_are_functions_of_seed_step_and_cloud_alone() -> None:
    saliency = torch.rand(5, 32, generator=torch.Generator().manual_seed(0))
    masks, clouds = GuidedMasks(), torch.tensor([3, 9, 4, 0, 7])
    before = masks.draw(saliency, 4, clouds)
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(masks.draw(saliency[order], 4, clouds[order]), before[order])
    for other in (masks.draw(saliency, 5, clouds), GuidedMasks(seed=1).draw(saliency, 4, clouds)):
        assert not torch.equal(other, before)
    assert masks.draw(saliency[:0], 4, clouds[:0]).shape == (0, 32)
    assert masks.draw(saliency.bfloat16(), 4, clouds).sum(1).tolist() == [26] * 5


def test_a_finer_group_is_seen_if_one_that_is_seen_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    xyz, offsets = torch.randn(90, 3, generator=generator), torch.tensor([0, 60, 60, 63, 90])
    levels = nested_groups(xyz, offsets, (20, 9, 6), (5, 4, 3))
    hidden = hidden_at_levels(GuidedMasks(0.7).draw(torch.ones(4, 6), 0, torch.arange(4)), levels)
    assert [level.shape[1] for level in hidden] == [20, 9, 6]
    assert hidden[-1].sum(1).tolist() == [4] * 4
    for fine, coarse in ((0, 1), (1, 2)):
        for cloud in range(4):
            kept = (~hidden[coarse][cloud]).nonzero()[:, 0].tolist()
            members = {place for group in kept for place in levels[coarse].near_BGK[cloud, group].tolist()}
            assert {*(~hidden[fine][cloud]).nonzero()[:, 0].tolist()} == members


def test_seen_places_come_first_and_padding_is_told() -> None:
    hidden = torch.tensor([[True, False, True, False], [True, True, True, False], [True] * 4])
    places, seen = seen_first(hidden)
    assert places[0].tolist() == [1, 3]
    assert places[1, 0] == 3
    assert seen.tolist() == [[True, True], [True, False], [False, False]]
    assert seen_first(hidden[2:])[0].shape == (1, 1)
    assert seen_first(hidden[:0])[0].shape[0] == 0


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, said in (
        ({"ratio": 1.0}, "ratio"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(UserError, match=said):
            GuidedMasks(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ratio"):
        require_hidden(GuidedMasks(0.1), 4, "Tests")
    assert np.isclose(GuidedMasks().visible(64), 13)
