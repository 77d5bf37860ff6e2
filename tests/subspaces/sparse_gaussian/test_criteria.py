"""Which coordinates of a sparse Gaussian are worth keeping."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.subspaces.sparse_gaussian.criteria import (
    SNR,
    Criterion,
    ExponentialSNR,
    MeanExponential,
    MeanSize,
    SizeOfMean,
    SizeSNR,
)

ALL = [SizeSNR(), MeanSize(), SizeOfMean(), SNR(), MeanExponential(), ExponentialSNR()]


@pytest.mark.parametrize(
    "criterion", [c for c in ALL if not isinstance(c, ExponentialSNR)], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("std", [0.0, 1e-6])
def test_where_sigma_vanishes_scores_order_by_the_size_of_mu(criterion: Criterion, std: float) -> None:
    mean_S = torch.tensor([0.5, -2.0, 0.0, 1e-3, -0.02, 1.0])
    score_S = criterion.of(mean_S, torch.full((6,), std))
    assert score_S.isfinite().all()
    assert torch.equal(score_S.argsort(), mean_S.abs().argsort())


def test_scores_are_their_definitions_by_draws() -> None:
    mean, std = 0.4, 0.6
    theta = mean + std * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size, grown = theta.abs(), theta.abs().exp()
    given = torch.tensor([mean]).double(), torch.tensor([std]).double()
    expected = {
        SizeSNR: size.mean() / size.std(),
        MeanSize: size.mean(),
        SizeOfMean: mean,
        SNR: mean / std,
        MeanExponential: grown.mean().log(),
        ExponentialSNR: grown.mean() / grown.std(),
    }
    for criterion in ALL:
        assert criterion.of(*given).item() == pytest.approx(float(expected[type(criterion)]), rel=5e-3)


def test_the_ratio_of_sizes_sees_a_sure_small_weight_above_an_unsure_large_one() -> None:
    mean_S, std_S = torch.tensor([0.1, 1.0]), torch.tensor([0.001, 1.0])
    assert SizeSNR().of(mean_S, std_S).argmax() == 0
    assert MeanSize().of(mean_S, std_S).argmax() == 1


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_bfloat16_large_and_empty_inputs_have_scores(criterion: Criterion) -> None:
    mean_S, std_S = torch.tensor([0.0, 1.0, -50.0, 3e-3]), torch.tensor([1e-3, 0.7, 20.0, 1e-8])
    score_S = criterion.of(mean_S.bfloat16(), std_S.bfloat16())
    assert not score_S.isnan().any()
    assert score_S.dtype in (torch.float32, torch.float64)
    assert criterion.of(mean_S[:0], std_S[:0]).shape == (0,)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="ExponentialSNR rate=0 must be above 0"):
        ExponentialSNR(0)
