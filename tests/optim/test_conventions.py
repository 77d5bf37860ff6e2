"""How long steps are: as the conventions say, whatever the shape, and in subspaces by the same words."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.optim import muon
from lightspan.optim.low_rank.bases import PowerBasis
from lightspan.optim.low_rank.inner import Adam
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import Apollo, ErrorFeedback, Fira
from lightspan.optim.matrices import conventions
from lightspan.optim.matrices.conventions import coordinate_factor, shape_factor
from lightspan.optim.matrices.stacks import Layout

SHAPES = [(12, 12), (48, 12), (12, 48), (3, 50)]
FEW = (2, 50)
"""Fewer rows than the stable rank of a larger update."""


def layout(shape: tuple[int, int], heads: tuple[int, ...] = ()) -> Layout:
    wide = shape[0] < shape[1]
    return Layout(max(shape), min(shape), 2, wide, torch.float64, torch.device("cpu"), (0,), heads=heads)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(rows: int, columns: int) -> Tensor:
    u, _, vh = torch.linalg.svd(draw(rows, columns), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", SHAPES)
def test_adamws_convention_gives_the_largest_singular_value_of_an_update_of_its_length_and_stable_rank(shape) -> None:
    """Of one with numbers of this root mean square, whose squared singular values sum to so many times the largest."""
    norm = conventions.RMS * math.sqrt(shape[0] * shape[1])
    largest = torch.linalg.matrix_norm(shape_factor("adamw", layout(shape)) * orthogonal(*shape), 2).item()
    assert norm**2 / largest**2 == pytest.approx(conventions.STABLE_RANK)


@pytest.mark.parametrize("shape", SHAPES)
def test_moonlights_convention_gives_the_numbers_of_an_update_a_root_mean_square_of_a_fifth(shape) -> None:
    update = shape_factor("kimi", layout(shape)) * orthogonal(*shape)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2)


def test_a_matrix_of_few_rows_has_an_update_as_long_as_adamws() -> None:
    assert shape_factor("adamw", layout(FEW)) == shape_factor("kimi", layout(FEW))
    assert coordinate_factor("adamw", layout(FEW)) == 1


@pytest.mark.parametrize("convention", ["adamw", "kimi"])
def test_what_is_orthogonalised_by_heads_is_as_long_as_what_is_whole(convention) -> None:
    shape, heads = (12, 24), (4, 4, 4)
    parts = torch.cat([orthogonal(rows, 24) for rows in heads])
    whole = shape_factor(convention, layout(shape)) * orthogonal(*shape)
    apart = shape_factor(convention, layout(shape, heads)) * parts
    torch.testing.assert_close(apart.norm(), whole.norm())


def stepped(weight: Tensor, **settings) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = LowRank([parameter], lr=0.1, rank=3, weight_decay=0.3, refresh=2, **settings)
    for seed in range(5):
        parameter.grad = draw(*weight.shape, seed=100 + seed)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("residual", [None, Fira(), Apollo(), ErrorFeedback()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_in_subspaces_it_is_one_factor_of_the_whole_update_and_none_of_the_decay(shape, residual) -> None:
    weight, factor = draw(*shape), coordinate_factor("adamw", layout(shape))
    assert factor == pytest.approx(math.sqrt(16 / conventions.IN_COORDINATES))
    settings = {"basis": PowerBasis(), "residual": residual}
    ours = stepped(weight, inner=Adam(convention="adamw"), **settings)
    torch.testing.assert_close(ours, stepped(weight, inner=Adam(), scale=factor, **settings), rtol=0, atol=1e-12)
    assert coordinate_factor("none", layout(shape)) == 1


def test_a_group_can_have_a_convention_of_its_own() -> None:
    weights = [nn.Parameter(draw(24, 16)) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "convention": "none"}]
    optimizer = LowRank(groups, lr=0.1, rank=3, residual=None, inner=Adam(convention="adamw"))
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = draw(24, 16, seed=1)
    optimizer.step()
    long, short = ((old - new.detach()).norm() for old, new in zip(before, weights, strict=True))
    assert (long / short).item() == pytest.approx(coordinate_factor("adamw", layout((24, 16))), rel=1e-3)


def test_a_convention_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="convention='kimi' must be one of adamw, none"):
        Adam(convention="kimi")
    with pytest.raises(UserError, match="convention='kimi' must be one of adamw, none"):
        LowRank([{"params": [nn.Parameter(draw(24, 16))], "convention": "kimi"}], rank=3)
    with pytest.raises(UserError, match="convention='match_rms_adamw' must be one of adamw, kj"):
        muon.Muon([nn.Parameter(draw(24, 16))], convention="match_rms_adamw")
