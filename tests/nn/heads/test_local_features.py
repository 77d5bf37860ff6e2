"""Features for places: the generalised mean and its ends, and maps on a finer grid."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.heads.local_features import UpConvolutions
from lightspan.nn.heads.pooling import GeM


def test_the_generalised_mean_is_the_mean_at_one_and_tends_to_the_maximum() -> None:
    x = torch.randn(3, 10, 4, dtype=torch.float64)
    torch.testing.assert_close(GeM(1.0).double()(x), x.clamp_min(1e-6).mean(1))
    torch.testing.assert_close(GeM(200.0).double()(x.abs()), x.abs().amax(1), rtol=0.02, atol=0)
    torch.testing.assert_close(GeM().double()(x), ((x.clamp_min(1e-6) ** 3).sum(1) / 10) ** (1 / 3))
    pool = GeM().double()
    assert torch.autograd.gradcheck(lambda given, p: torch.func.functional_call(pool, {"p": p}, given), (
        x.abs().add(0.1).requires_grad_(), torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    ))  # fmt: skip


def test_what_is_not_positive_counts_as_the_least_and_stays_finite() -> None:
    pool = GeM()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((2, 5, 3), -1.0, dtype=dtype, requires_grad=True)
        pooled = pool(x)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, torch.full((2, 3), 1e-6))
        pooled.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()
        assert pool.p.grad is not None
        assert pool.p.grad.isfinite()
    with pytest.raises(UserError, match="p="):
        GeM(0.0)


def test_two_transposed_convolutions_make_61_places_of_16_and_unit_vectors_row_by_row() -> None:
    head = UpConvolutions(8, [6, 4])
    x = torch.randn(2, 8, 16, 3)
    places = head(x)
    assert places.shape == (2, 61 * 9, 4)
    torch.testing.assert_close(places.norm(dim=2), torch.ones(2, 61 * 9))
    map_ = head.layers(x)
    torch.testing.assert_close(places[1, 9 * 5 + 2], map_[1, :, 5, 2] / map_[1, :, 5, 2].norm())
    assert sum(p.numel() for p in UpConvolutions(1024).parameters()) == 9 * 1024 * 256 + 256 + 9 * 256 * 128 + 128
    assert head(x[:0]).shape == (0, 61 * 9, 4)
    for wrong in ([], [4, 0]):
        with pytest.raises(UserError, match="widths"):
            UpConvolutions(8, wrong)
