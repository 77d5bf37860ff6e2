"""Local CKA by a change of rank one against CKA of the anchors with one pair more."""

import pytest
import torch
from torch import Tensor

from lightspan.evaluation.alignment.local_cka import local_cka
from lightspan.evaluation.geometry.similarity import linear_cka


def drawn(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("anchors", [1, 2, 30])
def test_it_is_the_cka_of_the_anchors_with_the_pair_added(anchors: int) -> None:
    x, y = drawn(anchors, 6, 0) + 5, drawn(anchors, 4, 1) - 3
    query, gallery = drawn(3, 6, 2) + 5, drawn(5, 4, 3) - 3
    found = local_cka(x, y, query, gallery)
    expected = [
        [linear_cka(torch.cat([x, a[None]]), torch.cat([y, b[None]]), debiased=False) for b in gallery] for a in query
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_rotations_shifts_and_a_common_scale_change_nothing() -> None:
    x, y, query, gallery = drawn(20, 5, 0), drawn(20, 4, 1), drawn(3, 5, 2), drawn(6, 4, 3)
    turn = torch.linalg.qr(drawn(5, 5, 4)).Q
    moved = local_cka(7 * x @ turn + 2, y - 1, 7 * query @ turn + 2, gallery - 1)
    torch.testing.assert_close(moved, local_cka(x, y, query, gallery))
    stretched = local_cka(x * torch.tensor([9.0, 1, 1, 1, 1]), y, query * torch.tensor([9.0, 1, 1, 1, 1]), gallery)
    assert float((stretched - local_cka(x, y, query, gallery)).abs().max()) > 1e-3


def test_rows_without_a_difference_have_none() -> None:
    flat, y = torch.full((9, 3), 0.1), drawn(9, 4, 1)
    assert not local_cka(flat, y, flat[:2], y).any()
    assert local_cka(flat, y, flat[:0], y).shape == (0, 9)
