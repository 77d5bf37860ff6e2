"""Places in a plane: exact where a plane has them, and the same for degenerate distances."""

import torch

from lightspan.evaluation.label_spaces.layout import plane_layout


def test_points_of_a_plane_keep_their_distances() -> None:
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = plane_layout(torch.cdist(x, x))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(x, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(found, plane_layout(torch.cdist(x, x)))


def test_distances_that_no_plane_has_are_weighed_by_their_inverse_squares() -> None:
    """The stress has no slope where it ends."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted, place = torch.pdist(x), plane_layout(torch.cdist(x, x), steps=3000).requires_grad_()
    ((torch.pdist(place) - wanted) / wanted).square().sum().backward()
    assert place.grad is not None
    assert place.grad.abs().amax() < 1e-3
    torch.testing.assert_close(place.detach().mean(dim=0), torch.zeros(2, dtype=torch.float64))


def test_a_path_lies_on_a_line_and_few_or_equal_things_have_places() -> None:
    line = torch.arange(5.0)[:, None]
    found = plane_layout(torch.cdist(line, line))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(line, line).double(), rtol=1e-3, atol=1e-3)
    for count in (0, 1, 4):
        assert plane_layout(torch.zeros(count, count)).tolist() == [[0.0, 0.0]] * count
    pair = plane_layout(torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
    torch.testing.assert_close((pair[0] - pair[1]).norm(), torch.tensor(3.0, dtype=torch.float64))
