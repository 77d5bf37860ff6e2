"""Random maps of all weights: against explicit matrices, their adjoints, their lengths, their slices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from scipy.stats import binom

from lightspan.core.errors import UserError
from lightspan.subspaces.projections import Dense, Fastfood, PerTensor, Projection, Sparse, derived_seed

KINDS = [Dense, Sparse, Fastfood]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(projection: Projection) -> torch.Tensor:
    """P [D d], column by column."""
    return torch.stack([projection.push(e_d) for e_d in torch.eye(projection.dim, dtype=torch.float64)], dim=1)


def published_fastfood(fast: Fastfood, transform: torch.Tensor | None = None) -> torch.Tensor:
    """H G Pi H B over sqrt(L sum G^2) sqrt(D / L) with whole matrices, from what the projection drew."""
    L, D = fast.length, fast.size
    H = torch.from_numpy(hadamard(L)).double() if transform is None else transform
    G = fast.normal_L.double()
    signs = torch.ones(L, dtype=torch.float64)
    signs[: fast.seen] = fast.scale_d.sign()
    whole = H @ G.diag() @ torch.eye(L, dtype=torch.float64)[fast.order_L.long()] @ H @ signs.diag()
    scale = (L * G.square().sum()).sqrt() * (D / L) ** 0.5
    padding = torch.eye(L, dtype=torch.float64)[:, : fast.seen]
    return torch.nn.functional.pad((whole @ padding)[:D] / scale, (0, fast.dim - fast.seen))


@pytest.mark.parametrize(("size", "dim"), [(64, 64), (64, 5), (40, 9), (33, 1), (1, 1), (7, 8), (5, 20)])
def test_fastfood_is_the_explicit_product(size: int, dim: int) -> None:
    fast = Fastfood(size, dim, seed=3)
    torch.testing.assert_close(matrix(fast), published_fastfood(fast), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [64, 40, 8])
def test_pull_is_the_gradient_and_orthonormal_transforms_in_the_backward_pass_alone_are_off_by_the_length(size) -> None:
    """Code that goes round for SAID divides each transform of its backward pass by sqrt(L), not those of its forward
    pass. L differs from tensor to tensor, so small tensors would come to lead.
    """
    fast, z_d, g_D = Fastfood(size, 6, 1), normal(6).requires_grad_(), normal(size, seed=1)
    (published_fastfood(fast) @ z_d @ g_D).backward()
    torch.testing.assert_close(fast.pull(g_D), z_d.grad, rtol=0, atol=1e-12)
    orthonormal = torch.from_numpy(hadamard(fast.length)).double() / fast.length**0.5
    ported_d = published_fastfood(fast, orthonormal).T @ g_D
    torch.testing.assert_close(fast.length * ported_d, z_d.grad, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 70))
def test_one_projection_a_tensor_is_adjoint_and_stacks_their_rows(kind, sizes, dim) -> None:
    stacked = PerTensor(sizes, dim, 5, kind)
    z_d, g_D = normal(dim), normal(sum(sizes), seed=1)
    rows = torch.cat([kind(n, dim, derived_seed(5, f"tensor {i}")).push(z_d) for i, n in enumerate(sizes)])
    assert torch.equal(stacked.push(z_d), rows)
    assert abs(rows @ g_D - z_d @ stacked.pull(g_D)) <= 1e-12 * (1 + z_d.norm() * g_D.norm())


@settings(max_examples=40)
@given(st.sampled_from([*KINDS, PerTensor]), st.data())
def test_slices_are_those_of_the_whole_and_their_pulls_sum_to_it(kind, data) -> None:
    size, dim = 90, 12
    projection = PerTensor([20, 1, 69], dim, 2, Sparse) if kind is PerTensor else kind(size, dim, 2)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=5)))
    bounds = list(itertools.pairwise([0, *cuts, size]))
    z_d, g_D = normal(dim), normal(size, seed=1)
    pieces = [projection.push(z_d, a, b) for a, b in bounds]
    torch.testing.assert_close(torch.cat(pieces), projection.push(z_d), rtol=0, atol=1e-14)
    total = sum(projection.pull(g_D[a:b], a) for a, b in bounds)
    torch.testing.assert_close(total, projection.pull(g_D), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_unit_length_over_all_rows(kind) -> None:
    lengths_d = matrix(kind(512, 40, 1)).norm(dim=0)
    assert (lengths_d - 1).abs().max() <= 1e-12


def test_fastfood_has_unit_columns_on_average_where_the_size_is_no_power_of_two() -> None:
    lengths = torch.stack([matrix(Fastfood(300, 20, seed)).square().sum(0) for seed in range(40)])
    assert lengths.mean().item() == pytest.approx(1, abs=0.02)
    assert lengths.std() < 0.3


def test_a_tensor_with_its_own_projection_has_unit_columns_of_its_own() -> None:
    stacked = matrix(PerTensor([128, 64, 256], 30, 0, Fastfood))
    for rows in stacked.split([128, 64, 256]):
        torch.testing.assert_close(rows.norm(dim=0), torch.ones(30).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(stacked.norm(dim=0), torch.full((30,), 3**0.5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_small_tensor_sees_the_first_coordinates_alone() -> None:
    small = PerTensor([3, 40], 20, 0, Fastfood)
    rows = matrix(small)[:3]
    assert rows[:, :4].abs().min() > 0
    assert torch.equal(rows[:, 4:], torch.zeros(3, 16).double())


def test_dense_entries_are_standard_normal_before_their_scale() -> None:
    entries = Dense(2000, 50, 0).entries_Dd
    assert entries.mean().item() == pytest.approx(0, abs=0.01)
    assert entries.std().item() == pytest.approx(1, abs=0.01)
    assert torch.corrcoef(entries.T).fill_diagonal_(0).abs().max() < 0.12


def test_sparse_entries_are_independent_with_probability_one_over_the_root_of_the_size() -> None:
    whole = matrix(Sparse(2500, 400, 0))
    counts_d, counts_D = (whole != 0).sum(0), (whole != 0).sum(1)
    assert counts_d.double().mean().item() == pytest.approx(50, abs=1.1)  # three deviations
    assert counts_d.double().var().item() == pytest.approx(49, rel=0.3)
    assert counts_D.double().var().item() == pytest.approx(8 * 0.98, rel=0.15)
    assert counts_D.max() < binom.isf(1e-6, 400, 0.02)
    signs = whole.sign().sum() / (whole != 0).sum()
    assert abs(signs) < 0.03
    constant = whole.abs().sum(0) / counts_d
    assert torch.equal((whole.abs() - constant).abs()[whole != 0] < 1e-12, torch.ones(len(whole[whole != 0])).bool())


def test_a_sparse_column_is_never_empty() -> None:
    for seed in range(50):
        torch.testing.assert_close(matrix(Sparse(4, 3, seed)).norm(dim=0), torch.ones(3).double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_makes_the_map_and_leaves_torchs_generator_alone(kind) -> None:
    before = torch.get_rng_state()
    z_d = normal(7, dtype=torch.float32)
    one, same, other = (kind(100, 7, seed).push(z_d) for seed in (4, 4, 5))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_results_have_the_dtype_of_the_argument_and_leave_it_alone(kind) -> None:
    projection = kind(64, 8, 0)
    z_d, g_D = normal(8), normal(64, seed=1)
    exact = projection.push(z_d), projection.pull(g_D)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        z, g = z_d.to(dtype), g_D.to(dtype)
        copies = z.clone(), g.clone()
        for found, wanted in zip((projection.push(z), projection.pull(g)), exact, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=2 * tolerance)
        assert torch.equal(z, copies[0])
        assert torch.equal(g, copies[1])


def test_fastfood_keeps_eight_bytes_a_row_and_sparse_nine_an_entry() -> None:
    def kept(projection: Projection) -> int:
        return sum(value.nbytes for value in vars(projection).values() if isinstance(value, torch.Tensor))

    assert kept(Fastfood(2**14, 100)) <= 8 * 2**14 + 8 * 100
    sparse = Sparse(2**14, 100)
    assert kept(sparse) == 9 * len(sparse.rows_K) + 8 * 100
    assert len(sparse.rows_K) < 1.1 * 100 * 2**7


def test_what_is_too_large_or_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"size=1000000 and dim=101 has 1e\+08 entries.*use Fastfood.*at most 100"):
        Dense(10**6, 101)
    for kind in KINDS:
        with pytest.raises(UserError, match=r"size=5 and dim=0 must both be at least 1"):
            kind(5, 0)


def groups_optimum(projection: Projection, scale: float = 1.0) -> float:
    """Least loss sum_k (sum of group k - k)^2 over z, of ten groups of 100 weights that start at zero."""
    sums_kd = matrix(projection).view(10, 100, -1).sum(1)
    target_k = torch.arange(10, dtype=torch.float64)
    solution = torch.linalg.lstsq(sums_kd, target_k[:, None], driver="gelsd").solution
    return (sums_kd @ solution - target_k[:, None]).square().sum().item()


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_groups_are_fitted_by_ten_coordinates_and_not_by_nine(kind) -> None:
    for seed in range(20):
        for dim in (10, 11, 25):
            assert groups_optimum(kind(1000, dim, seed)) <= 1e-10
    losses = [groups_optimum(kind(1000, dim, seed)) for seed in range(20) for dim in range(1, 10)]
    assert sum(loss > 1e-3 for loss in losses) >= 0.95 * len(losses)
    assert torch.tensor(losses).median() > 1
