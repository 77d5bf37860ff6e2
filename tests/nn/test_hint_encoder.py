import pytest
import torch
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.nn.frames import as_clip, as_frames, by_frame
from lightspan.nn.hint_encoder import HintEncoder


def test_a_hint_is_nothing_at_the_start_and_its_last_layer_learns_at_once() -> None:
    encoder = HintEncoder(5, widths=(4, 6), halvings=1)
    hint = encoder(torch.randn(2, 3, 8, 8))
    assert torch.equal(hint, torch.zeros(2, 5, 4, 4))
    (hint + torch.randn(2, 5, 4, 4)).square().sum().backward()
    assert encoder.last.weight.grad.abs().min() > 0  # type: ignore[union-attr]
    assert encoder.scale.item() == 2


def test_a_hint_is_what_its_layers_make_one_after_the_other() -> None:
    """The first steps keep the sides, the last ones halve them; an activation follows each but the last layer."""
    encoder = HintEncoder(5, widths=(4, 6, 8), halvings=1)
    torch.nn.init.normal_(encoder.last.weight)
    torch.nn.init.normal_(encoder.last.bias)  # type: ignore[arg-type]
    picture = torch.randn(2, 3, 8, 6)
    x = F.silu(F.conv2d(picture, encoder.first.weight, encoder.first.bias, padding=1))
    for step, stride in zip(encoder.steps, (1, 2), strict=True):
        x = F.silu(F.conv2d(x, step.weight, step.bias, stride=stride, padding=1))  # type: ignore[arg-type]
    expected = 2 * F.conv2d(x, encoder.last.weight, encoder.last.bias)
    torch.testing.assert_close(encoder(picture), expected)


@pytest.mark.parametrize(
    ("sides", "halvings", "expected"), [((8, 8), 3, (1, 1)), ((9, 17), 3, (2, 3)), ((5, 4), 0, (5, 4))]
)
def test_sides_are_halved_and_rounded_up(sides: tuple[int, int], halvings: int, expected: tuple[int, int]) -> None:
    assert HintEncoder(2, halvings=halvings)(torch.zeros(0, 3, *sides)).shape == (0, 2, *expected)


@pytest.mark.parametrize(
    ("name", "settings"), [("out_chans", {"out_chans": 0}), ("widths", {"widths": ()}), ("halvings", {"halvings": 4})]
)
def test_sizes_that_do_not_fit_are_refused(name: str, settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=name):
        HintEncoder(**({"out_chans": 2} | settings))


def test_frames_are_a_clip_and_back() -> None:
    clip = torch.randn(2, 3, 4, 5, 6)
    frames = as_frames(clip)
    assert torch.equal(frames[1 * 4 + 3], clip[1, :, 3])
    assert torch.equal(as_clip(frames, 4), clip)
    assert torch.equal(by_frame(torch.nn.Identity(), clip), clip)
    assert as_clip(as_frames(clip[:0]), 4).shape == (0, 3, 4, 5, 6)
