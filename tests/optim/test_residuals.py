"""Residuals: their algebra against the definitions, the limiter, and error feedback that loses nothing."""

import pytest
import torch
from torch import nn

from lightspan.errors import UserError
from lightspan.optim.bases import DCTBasis, GaussianBasis, PowerBasis, RandomBasis
from lightspan.optim.inner import SGD
from lightspan.optim.layout import Layout
from lightspan.optim.low_rank import LowRank
from lightspan.optim.residuals import Apollo, Dropped, ErrorFeedback, Fira

LAYOUT = Layout(7, 5, 2, False, torch.float64, torch.device("cpu"), (0, 1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(seed=0):
    """Gradient, orthonormal frame, coordinates and a direction of two matrices."""
    gradient, frame = draw(2, 7, 5, seed=seed), torch.linalg.qr(draw(2, 5, 2, seed=seed + 1)).Q
    return gradient, frame, gradient @ frame, draw(2, 7, 2, seed=seed + 2)


def lifted(residual, gradient, frame, coordinates, direction, state):
    energy = gradient.square().sum(-1)
    coefficients, scale = residual.terms(direction.clone(), coordinates, energy, state)
    update = coefficients @ frame[..., : coefficients.shape[-1]].mT
    return update + scale[..., None] * gradient if len(scale) else update


def test_firas_one_back_projection_is_the_scaled_residual_beside_the_lifted_direction():
    gradient, frame, r, u = parts()
    update = lifted(Fira(), gradient, frame, r, u, Fira().initial(LAYOUT))
    scale = u.norm(dim=-1) / r.norm(dim=-1)
    torch.testing.assert_close(update, u @ frame.mT + scale[..., None] * (gradient - r @ frame.mT))


def test_the_limiter_holds_growth_and_lets_shrinking_pass():
    state, norms = Fira(1.5).initial(LAYOUT), []
    for size in (1.0, 10.0, 10.0, 0.1):
        gradient, frame, r, u = parts()
        gradient = r @ frame.mT + size * (gradient - r @ frame.mT)
        update = lifted(Fira(1.5), gradient, frame, r, u, state)
        norms.append((update - u @ frame.mT).norm(dim=(1, 2)))
    torch.testing.assert_close(norms[1], 1.5 * norms[0])
    torch.testing.assert_close(norms[2], 1.5 * norms[1])
    torch.testing.assert_close(norms[3], 0.1 * norms[0])


def test_apollo_scales_whole_rows_or_the_whole_matrix_and_lifts_nothing():
    gradient, frame, r, u = parts()
    by_row = lifted(Apollo(limit=None), gradient, frame, r, u, {})
    torch.testing.assert_close(by_row, (u.norm(dim=-1) / r.norm(dim=-1))[..., None] * gradient)
    whole = lifted(Apollo("tensor", None), gradient, frame, r, u, {})
    torch.testing.assert_close(whole, (u.norm(dim=(1, 2)) / r.norm(dim=(1, 2)))[:, None, None] * gradient)


@pytest.mark.parametrize("residual", [Fira(), Apollo(), Apollo("tensor")])
def test_a_zero_gradient_stays_finite(residual):
    zero = torch.zeros(2, 7, 5, dtype=torch.float64)
    frame = torch.linalg.qr(draw(2, 5, 2)).Q
    update = lifted(residual, zero, frame, zero @ frame, zero[..., :2], residual.initial(LAYOUT))
    assert torch.equal(update, zero)


@pytest.mark.parametrize(
    ("precision", "size"), [("float32", 8 * 35), ("bfloat16", 2 * 35), ("int8", 35), ("int4", 7 * 3)]
)
def test_error_feedback_takes_the_bytes_of_its_format(precision, size):
    state = ErrorFeedback(precision).initial(LAYOUT)
    assert state["error"].nbytes == 2 * size


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kept", [0.0, 0.95])
def test_what_a_step_leaves_out_comes_back_in_the_next(precision, kept):
    residual = ErrorFeedback(precision, kept)
    state, one = residual.initial(LAYOUT), torch.ones((), dtype=torch.float64)
    gradient, frame, *_ = parts()
    accumulated = residual.accumulate(list(gradient), state, one)
    r = torch.stack([*accumulated]).double() @ frame
    residual.remember([a.double() for a in accumulated], r, frame, {}, state, (0.9, 0.99))
    error = torch.stack(residual.accumulate([torch.zeros_like(g) for g in gradient], state, one))
    expected = gradient - (1 - kept) * r @ frame.mT
    step = {"float32": 1e-12, "bfloat16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}[precision]
    assert ((error - expected).abs() <= step * expected.abs().amax(-1, keepdim=True) + 1e-12).all()


def test_with_error_feedback_the_sum_of_updates_reaches_the_sum_of_gradients():
    """Plain SGD on a constant gradient: what a random frame misses in one step is caught by a later one."""
    gradient, moved = draw(6, 4), {}
    for residual in (None, ErrorFeedback()):
        weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
        optimizer = LowRank([weight], lr=1.0, rank=2, basis=RandomBasis(), residual=residual, inner=SGD(0.0), refresh=1)
        for _ in range(200):
            weight.grad = gradient.clone()
            optimizer.step()
        moved[residual] = (weight + 200 * gradient).norm() / (200 * gradient).norm()
    assert moved[ErrorFeedback()] < 0.02 < 0.3 < moved[None]


def test_clipping_comes_before_error_feedback():
    weights = [nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        LowRank([w], lr=1.0, rank=2, basis=DCTBasis(), residual=ErrorFeedback(), refresh=1, max_norm=n)
        for w, n in zip(weights, (0.5, None), strict=True)
    ]
    for step in range(5):
        gradient = draw(6, 4, seed=step)
        weights[0].grad, weights[1].grad = gradient.clone(), gradient.clone()
        torch.nn.utils.clip_grad_norm_([weights[1]], 0.5)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("residual", [None, Fira(), ErrorFeedback()])
def test_frames_that_are_not_orthonormal_go_with_apollo_only(residual):
    weight = nn.Parameter(torch.zeros(6, 4))
    kind = type(residual or Dropped()).__name__
    with pytest.raises(UserError, match=f"GaussianBasis has no orthonormal frames, which residual={kind} needs"):
        LowRank([weight], rank=2, basis=GaussianBasis(), residual=residual)
    LowRank([weight], rank=2, basis=GaussianBasis(), residual=Apollo())
    LowRank([weight], rank=2, basis=PowerBasis(), residual=Apollo())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fira(1.0), r"Fira limit=1.0 must be above 1"),
        (lambda: Apollo(limit=0.5), r"Apollo limit=0.5 must be above 1"),
        (lambda: ErrorFeedback(kept=1.0), r"ErrorFeedback kept=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
