"""Relations of two views: turns against rotation matrices, signs of quaternions, and what they refuse."""

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import ViewParameters
from lightspan.nn.relations import Difference, PlaneTurn, Relations, SpaceTurn, parameters_of


def poses(count: int = 20) -> tuple[Rotation, Rotation]:
    return Rotation.random(count, 0), Rotation.random(count, 1)


def quaternions(turns: Rotation) -> Tensor:
    """w x y z; scipy has w last."""
    return torch.from_numpy(turns.as_quat()).roll(1, 1)


def test_the_quaternion_is_that_of_scipys_relative_rotation_whatever_the_signs() -> None:
    first, second = poses()
    both = torch.stack([quaternions(first), quaternions(second)], dim=1)
    found = SpaceTurn()(both)
    expected = quaternions(first.inv() * second)
    expected = torch.where(expected[:, :1] < 0, -expected, expected)
    torch.testing.assert_close(found, expected)
    signs = torch.tensor([1.0, -1.0]).repeat(20)[:40].view(20, 2, 1)
    assert torch.equal(SpaceTurn()(both * signs), found)
    assert (found[:, 0] >= 0).all()


def test_half_a_turn_has_one_sign_too() -> None:
    """Its w is 0, so the next number decides."""
    rest, half = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, -1.0, 0.0])
    for one in (half, -half):
        assert SpaceTurn()(torch.stack([rest, one])[None]).tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_a_turn_in_the_plane_is_the_angle_between_both_in_any_unit() -> None:
    degrees = torch.tensor([[[10.0], [100.0]], [[350.0], [-10.0]]])
    torch.testing.assert_close(PlaneTurn(0)(degrees), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(PlaneTurn(0, unit=1.0)(degrees / 360), PlaneTurn(0)(degrees), atol=1e-5, rtol=0)


def test_columns_are_named_as_parameters_of_views_are() -> None:
    parameters = torch.arange(2.0 * len(ViewParameters._fields)).view(1, 2, -1)
    places = [ViewParameters._fields.index(name) for name in ("hue", "angle")]
    by_name, by_place = Difference(["hue", "angle"], scale=2.0), Difference([*places], scale=2.0)
    assert torch.equal(by_name(parameters), by_place(parameters))
    assert by_name(parameters).tolist() == [[len(ViewParameters._fields) / 2] * 2]
    both = Relations([by_name, PlaneTurn()])
    assert both.num_features == both(parameters).shape[1] == 4


def test_what_they_cannot_tell_is_named() -> None:
    with pytest.raises(UserError, match="column 'angel' is none of the parameters of a view"):
        PlaneTurn("angel")
    with pytest.raises(UserError, match=r"reads column 4 .* and the data have 4"):
        SpaceTurn(1)(torch.zeros(1, 2, 4))
    with pytest.raises(UserError, match=r"Difference columns=\[\]"):
        Difference([])
    with pytest.raises(UserError, match=r"unit=0\.0 must be above 0"):
        PlaneTurn(0, unit=0.0)
    with pytest.raises(UserError, match="parts is an empty list"):
        Relations([])
    with pytest.raises(UserError, match=r"this batch has \[3, 4, 5\] \(it holds parameters\)"):
        parameters_of({"parameters": torch.zeros(3, 4, 5)}, "SIE")
