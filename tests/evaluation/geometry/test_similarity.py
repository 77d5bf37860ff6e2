"""CKA and information imbalance: invariances, the definition written out, and what DADApy 0.3.4 computes."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.similarity import imbalance_ranks, linear_cka


def drawn(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def waves() -> Tensor:
    """600 points in 5 dimensions from sines: the same numbers in every library."""
    place = torch.arange(600, dtype=torch.float64)
    return torch.stack([torch.sin(1.7 * k * place + k * k) * (1 if k < 3 else 0.05) for k in range(1, 6)], dim=1)


def written_out(x: Tensor, y: Tensor) -> float:
    """Debiased CKA from kernels with zeros on their diagonals."""

    def hsic(k: Tensor, m: Tensor) -> float:
        n, one = len(k), torch.ones(len(k), dtype=torch.float64)
        middle = float(one @ k @ one) * float(one @ m @ one) / ((n - 1) * (n - 2))
        return float((k @ m).trace()) + middle - 2 / (n - 2) * float(one @ k @ m @ one)

    k, m = (z @ z.T - torch.diag((z @ z.T).diagonal()) for z in (x, y))
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("width", [4, 40])
def test_debiased_cka_is_its_definition_and_knows_no_shift(width: int) -> None:
    x, y = drawn(12, width), drawn(12, 6, 1) + drawn(12, width)[:, :1]
    assert linear_cka(x, y) == pytest.approx(written_out(x, y))
    assert linear_cka(x + 5, y - 3) == pytest.approx(linear_cka(x, y))


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_one_for_rotated_and_scaled_features_and_symmetric(debiased: bool) -> None:
    x, y = drawn(50, 6), drawn(50, 9, 1)
    turned = 1e-200 * x @ torch.linalg.qr(drawn(6, 6, 2)).Q + 3e-200
    assert linear_cka(x, turned, debiased) == pytest.approx(1)
    assert linear_cka(x, y, debiased) == pytest.approx(linear_cka(y, x, debiased))
    assert linear_cka(x, x[:, :1].expand(50, 3), debiased) < 0.9


def test_independent_features_have_no_debiased_cka_and_much_biased_one() -> None:
    pairs = [(drawn(40, 200, 2 * seed), drawn(40, 200, 2 * seed + 1)) for seed in range(5)]
    assert abs(sum(linear_cka(*pair) for pair in pairs) / 5) < 0.03
    assert min(linear_cka(*pair, debiased=False) for pair in pairs) > 0.8


def test_the_imbalance_is_that_of_dadapy() -> None:
    a, b = waves()[:, :3], waves()[:, 2:4]
    for one, other, neighbours, expected in ((a, b, 1, 0.004966666666666667), (b, a, 3, 0.17405)):
        assert 2 / 600 * float(imbalance_ranks(one, other, neighbours).mean()) == pytest.approx(expected, rel=1e-12)
    few = imbalance_ranks(a[:50], b[:50], 2)
    assert torch.equal(few, imbalance_ranks(a[:50], b[:50], 2, chunk=7))


def test_a_projection_tells_less_than_the_whole() -> None:
    whole = drawn(200, 3)
    part = whole[:, :1]
    forth, back = (2 / 200 * float(imbalance_ranks(*pair).mean()) for pair in ((whole, part), (part, whole)))
    assert forth < 0.5 * back
    assert torch.equal(imbalance_ranks(whole, 5 * whole), torch.ones(200, dtype=torch.float64))
    assert 2 / 200 * float(imbalance_ranks(drawn(200, 3, 1), whole).mean()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_features_tell_nothing_whatever_the_order_of_samples(constant: int) -> None:
    pair = [drawn(20, 2).sort(dim=0).values, torch.ones(20, 2)]
    ranks = imbalance_ranks(*(pair if constant else pair[::-1]))
    assert ranks.tolist() == pytest.approx([10] * 20)  # the mean of 1 to 19


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_cannot_be_compared_is_refused(dtype: torch.dtype) -> None:
    x = drawn(10, 3).to(dtype)
    for compute in (linear_cka, imbalance_ranks):
        with pytest.raises(UserError, match=r"same samples, but got 10 and 9"):
            compute(x, x[:9])
        with pytest.raises(UserError, match=r"got 2 samples, but needs"):
            compute(x[:2], x[:2])
        with pytest.raises(UserError, match=r"NaN or infinite"):
            compute(x, x * torch.nan)
        with pytest.raises(UserError, match=r"without features"):
            compute(x, x[:, :0])
    with pytest.raises(UserError, match=r"second features hardly differ"):
        linear_cka(x, torch.ones(10, 2, dtype=dtype))
