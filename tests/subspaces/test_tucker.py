"""The Tucker form against einsum, its ranks, and its two directions."""

import pytest
import torch

from lightspan.subspaces.tucker import compose, mode_product

SIZES = {2: (7, 5), 3: (4, 5, 3), 4: (6, 4, 3, 3), 5: (4, 3, 2, 3, 2)}
EINSUM = {2: "ab,ia,jb->ij", 3: "abc,ia,jb,kc->ijk", 4: "abcd,ia,jb,kc,ld->ijkl", 5: "abcde,ia,jb,kc,ld,me->ijklm"}


@pytest.mark.parametrize("axes", SIZES)
def test_composition_is_the_sum_over_the_core(axes):
    core = torch.randn((2, 3, 2, 1, 2)[:axes], dtype=torch.float64)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(SIZES[axes], core.shape, strict=True)]
    whole = torch.einsum(EINSUM[axes], core, *factors)
    torch.testing.assert_close(compose(core, factors), whole, rtol=1e-10, atol=1e-10)
    for axis, rank in enumerate(core.shape):
        assert torch.linalg.matrix_rank(whole.movedim(axis, 0).flatten(1)) <= rank


def test_none_leaves_an_axis_alone():
    tensor, matrix = torch.randn(3, 4, 5), torch.randn(2, 4)
    assert torch.equal(compose(tensor, [None, matrix, None]), mode_product(tensor, matrix, 1))
