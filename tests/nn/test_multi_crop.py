import torch
from torch import Tensor, nn

from lightspan.nn.multi_crop import one_pass_a_size


def test_views_of_one_size_go_through_together_and_come_back_one_by_one() -> None:
    network, sizes = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), []
    network.register_forward_hook(lambda module, given, out: sizes.append([*given[0].shape]))
    views = [torch.randn(rows, 3, side, side) for rows, side in ((2, 8), (2, 8), (2, 5), (3, 5), (1, 5), (2, 8))]
    seen = one_pass_a_size(network, views)
    assert sizes == [[4, 3, 8, 8], [6, 3, 5, 5], [2, 3, 8, 8]]
    for view, out in zip(views, seen, strict=True):
        torch.testing.assert_close(out, network(view))


def test_what_a_network_gives_may_have_any_shape_and_no_view_gives_none() -> None:
    def tokens(image: Tensor) -> Tensor:
        return image.flatten(2).mT

    (seen,) = one_pass_a_size(tokens, [torch.zeros(2, 3, 4, 4)])
    assert seen.shape == (2, 16, 3)
    assert one_pass_a_size(tokens, []) == []
