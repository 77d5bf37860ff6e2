"""A BatchNorm of any number of rows."""

import torch

from lightspan.nn.row_norm import RowNorm


def test_a_norm_of_one_row_takes_what_it_has_seen() -> None:
    norm = RowNorm(2)
    norm(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    before = norm.running_mean.clone()
    one = torch.tensor([[4.0, 5.0]])
    assert torch.equal(norm(one), norm.eval()(one))
    assert torch.equal(norm.running_mean, before)


def test_no_rows_are_normed_and_give_gradients_of_zero() -> None:
    norm = RowNorm(2)
    norm(torch.zeros(0, 2)).sum().backward()
    assert not norm.weight.grad.any()
    assert norm.running_var.tolist() == [1, 1]
