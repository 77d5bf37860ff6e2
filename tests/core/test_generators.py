"""Draws that leave no trace."""

import torch

from lightspan.core.generators import drawn_from


def test_draws_are_those_of_the_seed_and_the_generator_goes_on_as_if_nothing_had_been() -> None:
    torch.manual_seed(5)
    expected = [torch.rand(3), torch.rand(3)]
    torch.manual_seed(5)
    first = torch.rand(3)
    with drawn_from(7):
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.stack([first, torch.rand(3)]), torch.stack(expected))
