import pytest
import torch

from lightspan.nn.heads.pooling import masked_mean


def test_the_mean_runs_over_the_positions_of_the_mask_alone() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0], [7.0, 7.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert torch.equal(masked_mean(x, mask), torch.tensor([[2.0, 4.0], [0.0, 0.0]]))
    full = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(masked_mean(x, full), x.mean(dim=1))


def test_what_stands_on_padding_gets_no_gradient() -> None:
    x = torch.randn(2, 4, 3, requires_grad=True)
    masked_mean(x, torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0, 1:], torch.zeros(3, 3))
    torch.testing.assert_close(x.grad[1, :3], torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_every_position(dtype: torch.dtype) -> None:
    # 257 is no number in bfloat16, and 70,000 none in half precision.
    for positions, value in ((257, 1.0), (700, 100.0)):
        x, mask = torch.full((1, positions, 2), value, dtype=dtype), torch.ones(1, positions)
        assert torch.equal(masked_mean(x, mask), torch.full((1, 2), value, dtype=dtype))


def test_weights_of_a_mask_do_not_count_and_what_is_masked_may_be_anything() -> None:
    x = torch.tensor([[[1.0], [3.0], [torch.nan]], [[torch.inf], [torch.nan], [2.0]], [[torch.nan]] * 3])
    x.requires_grad_()
    pooled = masked_mean(x, torch.tensor([[1, 2, 0], [0, 0, 1], [0, 0, 0]]))
    assert torch.equal(pooled.detach(), torch.tensor([[2.0], [2.0], [0.0]]))
    pooled.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_sequence_of_no_positions_gives_zeros() -> None:
    assert torch.equal(masked_mean(torch.zeros(2, 0, 3), torch.zeros(2, 0)), torch.zeros(2, 3))
