"""Logits of class subspaces: invariances, limits, degenerate features, and the gradient on the manifold."""

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.heads.grassmann_head import GrassmannHead
from lightspan.optim.groups import ParameterGroups
from lightspan.subspaces.grassmann import Horizontal

FEATURES, CLASSES = 6, 4


def head(rank: int = 2, **settings: float) -> GrassmannHead:
    return GrassmannHead(FEATURES, CLASSES, rank, **settings).double()


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def turned(frame: Tensor) -> Tensor:
    return frame @ torch.linalg.qr(torch.randn(frame.shape[-1], frame.shape[-1], dtype=torch.float64)).Q


def test_logits_are_lengths_of_projections_times_the_scale() -> None:
    made, x = head(scale=3.0), rows()
    expected = [[3 * (s.T @ (v / v.norm())).norm() for s in made.frame_KFR] for v in x]
    torch.testing.assert_close(made(x), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(made(7 * x), made(x))
    torch.testing.assert_close(made(-x), made(x))


def test_turning_a_frame_within_its_span_changes_nothing() -> None:
    made, x = head(), rows()
    before = made(x)
    with torch.no_grad():
        made.frame_KFR.copy_(turned(made.frame_KFR))
    torch.testing.assert_close(made(x), before)


def test_one_dimension_is_the_absolute_cosine_and_all_are_the_scale() -> None:
    made, x = head(1), rows()
    cosine = torch.cosine_similarity(x[:, None], made.frame_KFR[None, :, :, 0], dim=2)
    torch.testing.assert_close(made(x), 25 * cosine.abs())
    torch.testing.assert_close(head(FEATURES)(x), torch.full((5, CLASSES), 25.0, dtype=torch.float64))


def test_the_projected_gradient_is_the_derivative_along_horizontal_directions() -> None:
    made, x = head(), rows()
    made(x).square().sum().backward()
    frame, gradient = made.frame_KFR.detach().clone(), made.frame_KFR.grad
    assert gradient is not None
    towards = Horizontal(frame).push(torch.randn_like(frame))
    step = 1e-6
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            made.frame_KFR.copy_(frame + sign * step * towards)
            ends.append(made(x).square().sum())
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((Horizontal(frame).push(gradient) * towards).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_equal_and_half_features_have_finite_logits_and_gradients(dtype: torch.dtype) -> None:
    made = GrassmannHead(FEATURES, CLASSES, 2)
    for x in (torch.zeros(3, FEATURES), torch.ones(3, FEATURES), rows().float(), torch.zeros(0, FEATURES)):
        given = x.to(dtype).requires_grad_()
        logits = made(given)
        assert logits.dtype == torch.float32
        logits.sum().backward()
        assert given.grad is not None
        assert given.grad.isfinite().all()
        assert logits.isfinite().all()
    assert not made(torch.zeros(1, FEATURES)).any()


def test_frames_start_orthonormal_and_equal_for_a_seed_and_are_a_group_of_their_own() -> None:
    one, same, other = GrassmannHead(6, 3, 2), GrassmannHead(6, 3, 2), GrassmannHead(6, 3, 2, seed=1)
    assert torch.equal(one.frame_KFR, same.frame_KFR)
    assert not torch.equal(one.frame_KFR, other.frame_KFR)
    torch.testing.assert_close(one.frame_KFR.mT @ one.frame_KFR, torch.eye(2).expand(3, 2, 2))
    groups = ParameterGroups(other_lr=0.5).build(torch.nn.Sequential(torch.nn.Linear(6, 6), one))
    by_name = {group["name"]: group for group in groups}
    assert by_name.keys() == {"matrices", "vectors", "frames"}
    assert by_name["frames"]["frames"] is True
    assert by_name["frames"]["weight_decay"] == 0
    assert "lr" not in by_name["frames"]
    assert "frames" not in by_name["matrices"]


@pytest.mark.parametrize(
    ("settings", "said"), [({"rank": 7}, "rank=7"), ({"rank": 0}, "rank=0"), ({"scale": 0.0}, "scale=0.0")]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=f"{said} must be"):
        head(**settings)
