import pytest
import torch

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
