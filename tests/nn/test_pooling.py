import torch

from lightspan.nn.pooling import masked_mean


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
