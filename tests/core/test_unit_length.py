"""Vectors at length 1: torch's bits, and no gradient of 1e12 at a vector of zeros."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.unit_length import unit_length
from lightspan.nn.heads.dino_head import Prototypes
from lightspan.objectives.koleo import koleo
from lightspan.objectives.prediction import prediction_distance


def both(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    found = function(x)  # type: ignore[operator]
    (found * torch.arange(1, 6)).sum().backward()
    return found.detach(), x.grad  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, -1])
def test_vectors_with_a_length_have_the_bits_of_torch(dtype: torch.dtype, dim: int) -> None:
    x = (torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]).to(dtype)
    for ours, theirs in zip(both(lambda x: unit_length(x, dim), x), both(lambda x: F.normalize(x, dim=dim), x)):  # noqa: B905
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", [0.0, 1e-14])
def test_a_vector_of_zeros_stays_one_without_a_gradient(dtype: torch.dtype, entry: float) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    x[1] = entry
    found, gradient = both(unit_length, x)
    kept, expected = both(lambda x: F.normalize(x, dim=-1), x[[0, 2]])
    assert torch.equal(found[[0, 2]], kept)
    assert torch.equal(gradient[[0, 2]], expected)
    assert not found[1].any()
    assert not gradient[1].any()


def test_what_is_not_a_number_stays_so() -> None:
    assert unit_length(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_heads_have_small_gradients_at_rows_of_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 5, dtype=dtype)
    x[0, 0] = 1
    x.requires_grad_()
    scores = Prototypes(5, 3)(x)
    (prediction_distance(x, torch.ones(4, 5)) + koleo(x) + scores.square().sum() + scores.sum()).backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e3
