"""The anchor of patches: when it is taken, what it sees and gives."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from lightspan.backbones.vit import TokenViT, vit
from lightspan.core.errors import UserError
from lightspan.nn.teachers.gram_anchor import GramAnchor


def network() -> TokenViT:
    return vit(16, 2, 2, img_size=8, patch_size=2, in_chans=1, sincos=False, any_size=True, registers=1)


def built(**settings: float | None) -> tuple[GramAnchor, TokenViT]:
    torch.manual_seed(0)
    anchor, backbone = GramAnchor(**settings), network()  # type: ignore[arg-type]
    anchor.build(backbone)
    return anchor, backbone


def taken_at(anchor: GramAnchor, steps: int = 20) -> list[int]:
    """After which of the steps the copy is taken."""
    at = []
    for step in range(steps):
        teacher = network()
        anchor.follow(teacher, step / steps, (step + 1) / steps)
        own = anchor.network.module.backbone  # type: ignore[union-attr]
        if all(torch.equal(a, b) for a, b in zip(own.parameters(), teacher.parameters(), strict=True)):  # type: ignore[union-attr]
            at.append(step + 1)
    return at


def test_it_is_taken_when_that_is_due_and_anew_after_each_renewal() -> None:
    assert taken_at(built(taken=0.0)[0]) == []  # it has the first weights
    assert taken_at(built(taken=0.3, start=0.5)[0]) == [6]
    assert taken_at(built(taken=0.3, start=0.5, renewed=0.1)[0]) == [6, 12, 14, 16, 18, 20]
    assert taken_at(built(start=0.5, renewed=0.15)[0]) == [13, 16, 19]


def test_it_is_a_copy_that_is_not_trained_and_is_part_of_the_state() -> None:
    anchor, backbone = built()
    own = anchor.network.module.backbone  # type: ignore[union-attr]
    for a, b in zip(own.parameters(), backbone.parameters(), strict=True):  # type: ignore[union-attr]
        assert a is not b
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert len(anchor.state_dict()) == len(backbone.state_dict())


def test_the_student_sees_views_smoothed_and_at_whole_patches() -> None:
    anchor, _ = built(scale=2.0)
    view = torch.randn(2, 1, 16, 16)
    expected = F.interpolate(view, (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(anchor.shrunk(view), expected)
    assert anchor.shrunk(torch.randn(1, 1, 18, 14)).shape[2:] == (8, 8)
    assert anchor.shrunk(torch.randn(1, 1, 2, 2)).shape[2:] == (2, 2)
    assert anchor.shrunk(view.bfloat16()).dtype == torch.bfloat16
    same, _ = built(scale=1.0)
    assert same.shrunk(view) is view


def test_it_gives_the_map_at_the_larger_size_resampled_to_the_students_grid() -> None:
    anchor, _ = built(scale=2.0)
    view = torch.randn(3, 1, 16, 16, requires_grad=True)
    tokens = anchor.network.module.backbone.tokens(view)[:, 2:]  # type: ignore[union-attr, operator]
    maps = F.interpolate(tokens.mT.reshape(3, 16, 8, 8), (4, 4), mode="bicubic")
    torch.testing.assert_close(anchor(view, (4, 4)), maps.flatten(2).mT)
    torch.testing.assert_close(anchor(view, (8, 8)), tokens)
    assert not anchor(view, (4, 4)).requires_grad


def test_it_counts_from_its_start_and_in_every_plan() -> None:
    anchor, _ = built(start=0.5)
    view = torch.zeros(1)
    assert [anchor.counts(share, view) for share in (0.0, 0.49, 0.5, 1.0)] == [False, False, True, True]
    with FakeTensorMode():
        assert anchor.counts(0.0, torch.zeros(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0"),
        ({"scale": 0.5}, "scale=0.5"),
        ({"taken": 0.5, "start": 0.2}, "taken=0.5 must be at most start=0.2"),
        ({"start": 1.5}, "start=1.5"),
        ({"renewed": 0.0}, "renewed=0.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GramAnchor(**settings)  # type: ignore[arg-type]
