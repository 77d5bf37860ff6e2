"""Mixtures: whose patches they show, that they can be taken apart again, and what is left where it does not come out
even.
"""

import math

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.masking.patch_mix import Mixtures, PatchMix
from lightspan.nn.sequences.patches import at_places, patchify

PATCH, GRID = (2, 2), (3, 5)


def images(count: int) -> torch.Tensor:
    """Every pixel tells its image and its place."""
    numbers = torch.arange(2 * 6 * 10).view(1, 2, 6, 10) / 1000
    return torch.arange(count).view(-1, 1, 1, 1) + numbers


def mixed(count: int, mix: PatchMix, step: int = 3, first: int = 0) -> Mixtures:
    return mix(images(count), PATCH, GRID, torch.arange(first, first + count), step)


@pytest.mark.parametrize("sources", [1, 2, 3, 4])
@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_every_seen_place_shows_one_source_and_taking_apart_gives_the_images_back(sources: int, hidden: float) -> None:
    made, whole = mixed(12, PatchMix(sources, hidden)), patchify(images(12), PATCH)
    mixtures = 12 // sources
    assert made.image_RChw.shape == (mixtures, 2, 6, 10)
    seen = made.see_RS
    assert seen.shape == (mixtures, max(1, int((1 - hidden) * 15)))
    assert all(len(row.unique()) == len(row) for row in seen)
    parts = made.sources(at_places(patchify(made.image_RChw, PATCH), seen))
    for rows, see, ask, part in zip(made.rows_MR, made.see_MRK, made.ask_MRA, parts, strict=True):
        assert torch.equal(part, at_places(whole[rows], see))
        places = torch.cat([see, ask], dim=1).sort(dim=1).values
        assert torch.equal(places, torch.arange(15).expand(mixtures, -1))
    sizes = [see.shape[1] for see in made.see_MRK]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(made.of_images(list(made.rows_MR)), torch.arange(12))


@pytest.mark.parametrize(("count", "sources"), [(0, 2), (1, 2), (5, 2), (5, 3), (2, 4)])
def test_images_that_do_not_come_out_even_each_have_one_place(count: int, sources: int) -> None:
    made = mixed(count, PatchMix(sources))
    assert made.rows_MR.shape == (sources, math.ceil(count / sources))
    assert torch.equal(made.of_images(list(made.rows_MR)), torch.arange(count))


def test_masks_are_a_function_of_step_and_number_and_spread_evenly() -> None:
    mix = PatchMix()
    a, again, later, other = mixed(8, mix), mixed(8, mix), mixed(8, mix, step=4), mixed(8, mix, first=8)
    assert torch.equal(a.see_RS, again.see_RS)
    assert not torch.equal(a.see_RS, later.see_RS)
    assert not torch.equal(a.see_RS, other.see_RS)
    assert torch.equal(mixed(6, mix, first=2).see_RS[:2], a.see_RS[2:])  # numbers 2 and 3, whatever is beside them
    counts = torch.stack([mixed(8, mix, step).see_MRK[0] for step in range(200)]).flatten().bincount(minlength=15)
    assert (counts.double() / (200 * 4) - 7 / 15).abs().max() < 0.08


def test_gradients_reach_the_patches_that_are_shown() -> None:
    x = images(4).requires_grad_()
    made = PatchMix()(x, PATCH, GRID, torch.arange(4), 0)
    made.image_RChw.sum().backward()
    assert torch.equal(x.grad[:2] + x.grad[2:], torch.ones(2, 2, 6, 10))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="sources=0 must be at least 1"):
        PatchMix(0)
    with pytest.raises(UserError, match=r"hidden=1\.0 lie in \[0, 1\)"):
        PatchMix(hidden=1.0)
    with pytest.raises(UserError, match="of 15 patches 3 are seen, too few for sources=4"):
        mixed(4, PatchMix(4, hidden=0.8))
