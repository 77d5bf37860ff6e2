import pytest
import torch

from lightspan.backbones.generators import ConvGenerator
from lightspan.core.errors import UserError


@pytest.mark.parametrize(("widths", "side"), [((4,), 3), ((4, 3), 6), ((4, 3, 2), 12)])
def test_each_further_width_doubles_the_sides(widths: tuple[int, ...], side: int) -> None:
    generator = ConvGenerator(5, in_chans=2, image_size=side, widths=widths)
    assert generator.layers[0].out_features == 3 * 3 * widths[0]
    assert generator(torch.randn(7, 5)).shape == (7, 2, side, side)
    assert generator(torch.randn(0, 5)).shape == (0, 2, side, side)


@pytest.mark.parametrize("name", ["latent_features", "in_chans", "image_size", "widths"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        ConvGenerator(**{name: {"widths": (4, 0)}.get(name, 0)})  # type: ignore[arg-type]


def test_a_size_that_no_map_doubles_to_is_refused() -> None:
    with pytest.raises(UserError, match="image_size=30"):
        ConvGenerator(image_size=30)


def test_no_map_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="widths"):
        ConvGenerator(widths=())
