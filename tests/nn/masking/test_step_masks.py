"""Masks of steps: their rate, spans, and what they are functions of."""

from itertools import pairwise

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.masking.step_masks import StepMasks

MANY = torch.arange(1000)


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5, 0.9])
def test_steps_are_hidden_at_the_rate_that_was_asked_for(share: float) -> None:
    hidden = StepMasks(share).draw(100, 3, MANY)
    deviation = (share * (1 - share) / hidden.numel()) ** 0.5
    assert abs(hidden.double().mean() - share) < 3 * deviation
    # Counts spread as a binomial's do, and are not fixed.
    assert hidden.sum(dim=1).double().var() == pytest.approx(100 * share * (1 - share), rel=0.2)


@pytest.mark.parametrize("span", [1, 2, 5, 30])
def test_each_place_is_hidden_at_the_same_rate_whatever_the_span(span: int) -> None:
    hidden = StepMasks(0.3, span).draw(40, 0, torch.arange(10_000))
    assert (hidden.double().mean(dim=0) - 0.3).abs().max() < 4 * (0.3 * 0.7 / 10_000) ** 0.5


@pytest.mark.parametrize("span", [2, 5])
def test_runs_of_hidden_steps_are_whole_spans_but_at_both_ends(span: int) -> None:
    for row in StepMasks(0.4, span).draw(60, 0, torch.arange(50)).tolist():
        changes = [place for place in range(1, 60) if row[place] != row[place - 1]]
        assert all((second - first) % span == 0 for first, second in pairwise(changes))


@pytest.mark.parametrize("span", [2, 5])
def test_spans_begin_at_each_place_equally_often(span: int) -> None:
    hidden = StepMasks(0.5, span).draw(24, 0, torch.arange(10_000))
    share = 0.5 / span  # of two spans beside each other one is hidden in half of the cases
    assert ((hidden[:, 1:] != hidden[:, :-1]).double().mean(dim=0) - share).abs().max() < 4 * (share / 10_000) ** 0.5


def test_none_and_all() -> None:
    assert not StepMasks(0.0).draw(50, 0, MANY).any()
    assert StepMasks(1.0, span=3).draw(50, 0, MANY).all()
    assert StepMasks().draw(50, 0, MANY[:0]).shape == (0, 50)
    assert StepMasks(span=4).draw(1, 0, MANY).shape == (1000, 1)


def test_they_are_functions_of_seed_step_and_number_alone() -> None:
    masks = StepMasks(0.5, seed=4)
    whole = masks.draw(64, 2, MANY[:6])
    assert torch.equal(masks.draw(64, 2, torch.tensor([5, 3])), whole[[5, 3]])
    for other in (masks.draw(64, 3, MANY[:6]), StepMasks(0.5, seed=5).draw(64, 2, MANY[:6])):
        assert (other != whole).double().mean() > 0.4


@pytest.mark.parametrize(("given", "said"), [((1.2,), "share=1.2 must lie"), ((0.5, 0), "span=0 must be at least 1")])
def test_settings_out_of_range_are_refused(given: tuple[float, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        StepMasks(*given)
