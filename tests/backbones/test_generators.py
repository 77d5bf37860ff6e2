import pytest
import torch

from lightspan.backbones.generators import ConvGenerator
from lightspan.core.errors import UserError


@pytest.mark.parametrize(("widths", "side"), [((4,), 3), ((4, 3), 6), ((4, 3, 2), 12)])
def test_each_further_width_doubles_the_sides(widths: tuple[int, ...], side: int) -> None:
    generator = ConvGenerator(5, in_chans=2, start=(3, 2), widths=widths)
    assert generator(torch.randn(7, 5)).shape == (7, 2, side, side * 2 // 3)
    assert generator(torch.randn(0, 5)).shape == (0, 2, side, side * 2 // 3)


@pytest.mark.parametrize("name", ["latent_features", "in_chans", "start", "widths"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        ConvGenerator(**{name: {"start": (0, 1), "widths": (4, 0)}.get(name, 0)})  # type: ignore[arg-type]


def test_no_map_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="widths"):
        ConvGenerator(widths=())
