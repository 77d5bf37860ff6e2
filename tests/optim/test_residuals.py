"""Residuals: their algebra against the definitions, the limiter, and error feedback that loses nothing."""

import pytest
import torch
from optim.plain_bases import RandomBasis
from torch import nn

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import DCTBasis, GaussianBasis, PowerBasis
from lightspan.optim.low_rank.inner import SGD
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import Apollo, ErrorFeedback, Fira, NoResidual, Terms
from lightspan.optim.matrices.stacks import Layout

LAYOUT = Layout(7, 5, 2, False, torch.float64, torch.device("cpu"), (0, 1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(seed=0):
    """Gradient, orthonormal frame, coordinates and a direction of two matrices."""
    gradient, frame = draw(2, 7, 5, seed=seed), torch.linalg.qr(draw(2, 5, 2, seed=seed + 1)).Q
    return gradient, frame, gradient @ frame, draw(2, 7, 2, seed=seed + 2)


def lifted(residual, gradient, frame, coordinates, direction, state):
    energy = gradient.square().sum(-1)
    if not residual.rescales:
        return direction @ frame.mT
    coefficients, scale = residual.terms(Terms(direction.clone(), coordinates, energy, LAYOUT), state)
    update = coefficients @ frame[..., : coefficients.shape[-1]].mT
    return update + scale[..., None] * gradient if len(scale) else update


def test_firas_one_back_projection_is_the_scaled_residual_beside_the_lifted_direction():
    gradient, frame, r, u = parts()
    for inside in (1.0, 0.25):
        update = lifted(Fira(None, None, inside), gradient, frame, r, u, {})
        scale = u.norm(dim=-1) / r.norm(dim=-1)
        torch.testing.assert_close(
            update, inside * u @ frame.mT + scale[..., None] * (gradient - inside * r @ frame.mT)
        )


def test_the_limiter_holds_growth_and_lets_shrinking_pass():
    residual = Fira(1.5, bound=None)
    state, norms = residual.initial(LAYOUT), []
    for size in (1.0, 10.0, 10.0, 0.1):
        gradient, frame, r, u = parts()
        gradient = r @ frame.mT + size * (gradient - r @ frame.mT)
        update = lifted(residual, gradient, frame, r, u, state)
        norms.append((update - u @ frame.mT).norm(dim=(1, 2)))
    torch.testing.assert_close(norms[1], 1.5 * norms[0])
    torch.testing.assert_close(norms[2], 1.5 * norms[1])
    torch.testing.assert_close(norms[3], 0.1 * norms[0])


def test_apollo_scales_whole_rows_or_the_whole_matrix_and_lifts_nothing():
    gradient, frame, r, u = parts()
    by_row = lifted(Apollo(limit=None, bound=None), gradient, frame, r, u, {})
    torch.testing.assert_close(by_row, (u.norm(dim=-1) / r.norm(dim=-1))[..., None] * gradient)
    whole = lifted(Apollo("tensor", None, None), gradient, frame, r, u, {})
    torch.testing.assert_close(whole, (u.norm(dim=(1, 2)) / r.norm(dim=(1, 2)))[:, None, None] * gradient)


RESCALING = [Fira(), Fira(inside=0.25), Apollo(), Apollo("tensor")]


@pytest.mark.parametrize("residual", RESCALING, ids=repr)
def test_rows_without_a_gradient_are_left_alone_and_spoil_nothing(residual):
    """Momentum keeps the direction up where the gradient is gone."""
    gradient, frame, _, u = parts()
    gradient[:, 2:5] = 0
    state = residual.initial(LAYOUT)
    update = lifted(residual, gradient, frame, gradient @ frame, 1e3 * u, state)
    inside = getattr(residual, "inside", 0)
    torch.testing.assert_close(update[:, 2:5], inside * 1e3 * u[:, 2:5] @ frame.mT)
    assert update.isfinite().all()
    assert state["limiter"].isfinite().all()
    lifted(residual, gradient, frame, gradient @ frame, u, state)
    assert (state["limiter"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-9, 1.0, 1e15])
@pytest.mark.parametrize("residual", RESCALING, ids=repr)
def test_what_is_rescaled_is_at_most_the_bound_times_an_isotropic_gradients_share(residual, size, dtype):
    """Gradients beside the frame by all angles down to none, of any length, under a momentum of order one."""
    gradient, frame, r, u = (x.to(dtype) for x in parts())
    beside = gradient - r @ frame.mT
    for angle in (1.0, 1e-3, 1e-20, 0.0):
        seen = size * (beside + angle * r @ frame.mT)
        seen[0, 1:3], seen[1] = seen[0, 1:3] * 1e-30, seen[1] * 1e-5
        update = lifted(residual, seen, frame, seen @ frame, u, residual.initial(LAYOUT))
        inside = residual.inside * u @ frame.mT if isinstance(residual, Fira) else 0
        per_row = isinstance(residual, Apollo) and residual.per == "tensor"
        over = (1, 2) if per_row else -1
        longest = residual.bound * (LAYOUT.size / LAYOUT.rank) ** 0.5 * u.norm(dim=over)
        assert update.isfinite().all()
        assert ((update - inside).norm(dim=over) <= 1.001 * longest).all()


def test_the_bound_lets_ordinary_rows_pass_bit_for_bit():
    gradient, frame = draw(2, 7, 512), torch.linalg.qr(draw(2, 512, 16, seed=1)).Q
    layout = Layout(7, 512, 16, False, torch.float64, torch.device("cpu"), (0, 1))
    r, energy, u = gradient @ frame, gradient.square().sum(-1), draw(2, 7, 16, seed=2)
    for kind in (Fira, Apollo):
        bounded, free = (
            kind(bound=bound).terms(Terms(u.clone(), r, energy, layout), kind().initial(layout))
            for bound in (4.0, None)
        )
        assert all(torch.equal(a, b) for a, b in zip(bounded, free, strict=True))


@pytest.mark.parametrize("residual", RESCALING, ids=repr)
def test_a_step_of_zeros_does_not_count_for_the_limiter(residual):
    gradient, frame, r, u = parts()
    states = [residual.initial(LAYOUT) for _ in range(2)]
    for state, sizes in zip(states, ((1e-3, 0.0, 1.0), (1e-3, 1.0)), strict=True):
        for size in sizes:
            last = lifted(residual, size * gradient, frame, size * r, size * u, state)
        state["last"] = last
    assert torch.equal(states[0]["limiter"], states[1]["limiter"])
    assert torch.equal(states[0]["last"], states[1]["last"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_leaves_the_limiter_finite(value):
    """With check_finite=False a step continues regardless; the limiter must serve the matrix afterwards."""
    for residual in RESCALING:
        gradient, frame, _, u = parts()
        state = residual.initial(LAYOUT)
        for broken in (True, False, True):
            seen = gradient.clone()
            seen[0, 3] = value if broken else 1.0
            lifted(residual, seen, frame, seen @ frame, u, state)
            assert state["limiter"].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_limiter_that_no_step_can_have_written_starts_anew(value):
    """In a checkpoint that is damaged."""
    ends = []
    for limiter in (value, 0.0):
        weight = nn.Parameter(draw(6, 4))
        weight.grad = draw(6, 4, seed=1)
        optimizer = LowRank([weight], rank=2)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["limiter"] = torch.tensor(limiter, dtype=torch.float64)
        optimizer.load_state_dict(saved)
        optimizer.step()
        ends.append((weight.detach(), optimizer.state[weight]["limiter"]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ends, strict=True))
    assert ends[0][1].isfinite()


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
    residual.remember([a.double() for a in accumulated], r, frame, None, state, (0.9, 0.99))
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
    kind = type(residual or NoResidual()).__name__
    with pytest.raises(UserError, match=f"GaussianBasis has no orthonormal frames, which residual={kind} needs"):
        LowRank([weight], rank=2, basis=GaussianBasis(), residual=residual)
    LowRank([weight], rank=2, basis=GaussianBasis(), residual=Apollo())
    LowRank([weight], rank=2, basis=PowerBasis(), residual=Apollo())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fira(1.0), r"Fira limit=1.0 must be above 1"),
        (lambda: Fira(bound=1.0), r"Fira bound=1.0 must be above 1"),
        (lambda: Fira(inside=0.0), r"Fira inside=0.0 must be in \(0, 1\]"),
        (lambda: Apollo(bound=torch.nan), r"Apollo bound=nan must be above 1"),
        (lambda: Apollo(limit=0.5), r"Apollo limit=0.5 must be above 1"),
        (lambda: ErrorFeedback(kept=1.0), r"ErrorFeedback kept=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
