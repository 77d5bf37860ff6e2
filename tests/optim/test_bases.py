"""Bases: what a refresh keeps of a gradient, and which frames it gives."""

import pytest
import torch
from optim.plain_bases import IdentityBasis, RandomBasis

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import DCTBasis, GaussianBasis, PowerBasis, SVDBasis
from lightspan.optim.matrices.stacks import Layout

FIXED = [DCTBasis(), DCTBasis(fast=False), IdentityBasis()]
ORTHONORMAL = [*FIXED, PowerBasis(), SVDBasis(), RandomBasis()]
SIZES = [2, 6, 7, 8, 12, 13]


def name(basis):
    return type(basis).__name__ if isinstance(basis, object) else str(basis)


def layout(rows=9, size=6, rank=3, batch=2, dtype=torch.float64):
    return Layout(rows, size, rank, False, dtype, torch.device("cpu"), tuple(range(batch)))


def gradients(batch=2, rows=9, size=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(batch, rows, size, generator=generator, dtype=torch.float64).to(dtype))


def refreshed(basis, like, given):
    return basis.refresh(given, basis.initial(like), like, first=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("basis", ORTHONORMAL, ids=name)
def test_frames_are_orthonormal_for_every_size(basis, size):
    like = layout(13, size, rank=max(1, size // 2))
    frame = basis.frame(refreshed(basis, like, gradients(rows=13, size=size)), like)
    torch.testing.assert_close(frame.mT @ frame, torch.eye(like.rank, dtype=torch.float64).expand(2, -1, -1))


@pytest.mark.parametrize("basis", [*ORTHONORMAL, GaussianBasis()], ids=name)
def test_state_keeps_shape_and_dtype_at_a_refresh(basis):
    like = layout()
    before = basis.initial(like)
    after = basis.refresh(gradients(), before, like, first=True)
    again = basis.refresh(gradients(seed=2), after, like, first=False)
    for state in (after, again):
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}


@pytest.mark.parametrize("basis", [*ORTHONORMAL, GaussianBasis()], ids=name)
def test_matrices_are_chosen_for_independently(basis):
    like = layout()
    together = refreshed(basis, like, gradients())
    second = refreshed(basis, like.part([1]), gradients()[1:])
    for key, value in second.items():
        torch.testing.assert_close(value, together[key][1:])


@pytest.mark.parametrize("basis", FIXED, ids=name)
def test_column_selection_takes_the_most_energetic_columns_and_loses_no_more_than_any_other_choice(basis):
    like = layout(size=8, rank=3, batch=1)
    (g,) = gradients(1, size=8)
    frame = basis.frame(refreshed(basis, like, [g]), like)[0]
    matrix = basis.matrix(like)
    energy = (g @ matrix).square().sum(dim=0)
    best = max(sum(energy[list(i)]) for i in torch.combinations(torch.arange(8), 3).tolist())
    torch.testing.assert_close((g @ frame).square().sum(), best, atol=1e-12, rtol=0)
    lost = (g - g @ frame @ frame.T).square().sum()
    torch.testing.assert_close(lost, g.square().sum() - best, atol=1e-12, rtol=0)
    assert lost <= (1 - 3 / 8) * g.square().sum()


@pytest.mark.parametrize("size", SIZES)
def test_fast_transform_and_product_select_the_same_columns_of_the_same_basis(size):
    like = layout(13, size, rank=max(1, size // 2))
    given = gradients(rows=13, size=size)
    slow, fast = (refreshed(DCTBasis(fast=fast), like, given) for fast in (False, True))
    assert torch.equal(slow["columns"], fast["columns"])
    torch.testing.assert_close(DCTBasis(fast=True).matrix(like), DCTBasis(fast=False).matrix(like))


def test_two_sizes_in_one_model_get_a_matrix_each():
    basis = DCTBasis()
    for size in (6, 7):
        assert (
            basis.frame(refreshed(basis, layout(size=size), gradients(size=size)), layout(size=size)).shape[1] == size
        )
    assert sorted(len(m) for m in basis.constants()) == [6, 7]


def test_the_one_norm_compares_sums_of_absolute_coordinates():
    like = layout(rows=4, size=3, rank=1, batch=1)
    g = torch.tensor([[3.0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1.1, 0]], dtype=torch.float64)
    chosen = [refreshed(IdentityBasis(norm=p), like, [g])["columns"].item() for p in (1, 2)]
    assert chosen == [1, 0]


def test_power_iteration_finds_what_the_svd_finds():
    like = layout(40, 20, rank=4, batch=1)
    left, right = (torch.linalg.qr(g).Q for g in gradients(2, 40, 20))
    spectrum = torch.tensor([10.0, 9, 8, 7] + [0.5] * 16, dtype=torch.float64)
    g = left * spectrum @ right[:20, :20].T
    frames = [b.frame(refreshed(b, like, [g]), like)[0] for b in (PowerBasis(first_iterations=8), SVDBasis())]
    torch.testing.assert_close(frames[0] @ frames[0].T, frames[1] @ frames[1].T, atol=1e-6, rtol=0)  # the nudge


def test_bfloat16_frames_take_half_the_bytes_and_stay_nearly_orthonormal():
    like = layout(40, 20, rank=4, dtype=torch.float32)
    half, full = (PowerBasis(precision=p) for p in ("bfloat16", "float32"))
    assert half.initial(like)["frame"].nbytes * 2 == full.initial(like)["frame"].nbytes
    frame = refreshed(half, like, gradients(rows=40, size=20, dtype=torch.float32))["frame"].float()
    assert (frame.mT @ frame - torch.eye(4)).abs().max() < 2**-7


def test_random_frames_change_at_each_refresh_and_repeat_with_the_seed():
    like, basis = layout(), RandomBasis()
    one = refreshed(basis, like, gradients())
    two = basis.refresh(gradients(), one, like.drawn([1, 1]), first=False)
    assert not torch.allclose(one["frame"], two["frame"])
    assert torch.equal(one["frame"], refreshed(RandomBasis(), like, gradients(seed=5))["frame"])


def test_gaussian_frames_keep_norms_in_the_mean():
    like = layout(rows=400, size=400, rank=200, batch=1)
    g = gradients(1, 400, 400)
    frame = GaussianBasis().frame(refreshed(GaussianBasis(), like, g), like)
    torch.testing.assert_close((g[0] @ frame[0]).norm(), g[0].norm(), rtol=0.02, atol=0)


def test_a_norm_that_is_neither_one_nor_two_is_refused():
    with pytest.raises(UserError, match="norm=3 must be 1 or 2"):
        DCTBasis(norm=3)
