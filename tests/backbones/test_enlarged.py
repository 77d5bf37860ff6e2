import pytest
import torch
from torch import nn

from lightspan.backbones.enlarged import Enlarged
from lightspan.core.errors import UserError


class Seen(nn.Module):
    num_features = 3

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1:] == (3, 8, 8)
        return image.mean(dim=(2, 3))


def test_grey_images_get_equal_channels_and_gradients_reach_them() -> None:
    image = torch.linspace(-1, 1, 32).view(2, 1, 4, 4).requires_grad_()
    found = Enlarged(Seen(), 8)(image)
    torch.testing.assert_close(found, image.mean(dim=(2, 3)).expand(-1, 3))
    found.sum().backward()
    assert image.grad is not None
    assert image.grad.all()
    assert Enlarged(Seen(), 8).num_features == 3


def test_coloured_images_of_their_size_stay_as_they_are() -> None:
    image = torch.arange(192.0).view(1, 3, 8, 8)
    assert torch.equal(Enlarged(nn.Identity(), 8)(image), image)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="size"):
        Enlarged(Seen(), 0)
    with pytest.raises(UserError, match="channel"):
        Enlarged(Seen(), 8)(torch.zeros(1, 2, 4, 4))
