"""Uniform numbers by (seed, step, name, place): who asks, for which part and in which order changes nothing."""

import pytest
import torch

from lightspan.subspaces.masks.draws import uniform


def python_uniform(start: int, stride: int, place: int) -> float:
    """splitmix64 in Python's integers."""
    x = (start + place * stride) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (((x ^ x >> 31) >> 12) + 0.5) / 2**52


def test_numbers_are_splitmix64s(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = (2**64 - 3, 0x9E3779B97F4A7C15)
    monkeypatch.setattr("lightspan.subspaces.masks.draws._stream", lambda *key: stream)
    expected = [python_uniform(*stream, place) for place in range(50)]
    assert uniform(0, 0, "w", [50], dtype=torch.float64).tolist() == expected


def test_a_block_has_the_numbers_of_its_place() -> None:
    whole = uniform(1, 2, "w", [5, 6, 3])
    assert torch.equal(uniform(1, 2, "w", [2, 4, 3], within=[5, 6, 3], offset=[3, 1, 0]), whole[3:, 1:5])
    assert uniform(1, 2, "w", [0, 6, 3], within=[5, 6, 3], offset=[5, 0, 0]).shape == (0, 6, 3)
    assert uniform(1, 2, "w", []).shape == ()


@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_how_many_are_drawn_at_once_changes_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"within": [5, 6, 3], "offset": [3, 1, 0]}
    whole, part = uniform(1, 2, "w", [5, 6, 3]), uniform(1, 2, "w", [2, 4, 3], **block)
    monkeypatch.setattr("lightspan.subspaces.masks.draws._AT_ONCE", at_once)
    assert torch.equal(uniform(1, 2, "w", [5, 6, 3]), whole)
    assert torch.equal(uniform(1, 2, "w", [2, 4, 3], **block), part)


def test_the_order_of_calls_and_torchs_own_generators_do_not_matter() -> None:
    first, second = uniform(0, 7, "a", [9]), uniform(0, 7, "b", [9])
    torch.manual_seed(3)
    torch.rand(5)
    assert torch.equal(uniform(0, 7, "b", [9]), second)
    assert torch.equal(uniform(0, 7, "a", [9]), first)
    assert torch.equal(uniform(0, 7, "a", [9], device="cpu"), first)


@pytest.mark.parametrize("other", [(1, 7, "a"), (0, 8, "a"), (0, 7, "b"), (0, 77, "a"), (-1, 7, "a")])
def test_another_seed_step_or_name_has_independent_numbers(other: tuple[int, int, str]) -> None:
    n = 20_000
    ours, theirs = uniform(0, 7, "a", [n], dtype=torch.float64), uniform(*other, [n], dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1]
    assert abs(correlation) < 4 / n**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_uniform_and_never_zero_nor_one(dtype: torch.dtype) -> None:
    n = 200_000
    u = uniform(0, 0, "w", [n], dtype=dtype)
    assert u.dtype == dtype
    assert u.log().isfinite().all()
    assert torch.log1p(-u).isfinite().all()
    bins = torch.histc(u.float(), 64, 0, 1)
    chi_square = ((bins - n / 64).square() / (n / 64)).sum()
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5
    lagged = torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]
    assert abs(lagged) < 4 / n**0.5


def test_the_extreme_float32_numbers_are_inside_the_interval() -> None:
    extremes = torch.tensor([0.5, 2.0**23 - 0.5]) * 2.0**-23
    assert extremes[0] > 0
    assert extremes[1] < 1


def test_rows_have_the_numbers_of_their_places_in_any_order() -> None:
    whole = uniform(1, 2, "w", [9, 2, 3])
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(uniform(1, 2, "w", [3, 2, 3], rows=rows), whole[rows])
    assert torch.equal(uniform(1, 2, "w", [1, 3], rows=torch.tensor([5])), uniform(1, 2, "w", [6, 3])[5:])
    assert uniform(1, 2, "w", [0, 3], rows=rows[:0]).shape == (0, 3)
