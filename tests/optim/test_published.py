"""The slow references themselves: cases in which a published optimiser is a known one, invariants, values by hand."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from optim.published import (
    adamw_rotated,
    apollo,
    apollo_mini,
    as_given,
    dct_adamw,
    dct_basis,
    fira,
    galore,
    ldadam,
    ldadam_frame,
    limited,
    newton_schulz,
    rotated_moments,
    row_scale,
    selected,
    svd_frames,
    tall,
    trion,
    trion_scale,
)
from torch import Tensor

SHAPES = [(7, 4), (4, 7), (5, 5)]
STEPS, BETAS, EPS = 9, (0.9, 0.99), 1e-8
ADAM = {"lr": 0.1, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
EXACT = {"atol": 1e-12, "rtol": 0.0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(shape: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    return normal(*shape), list(normal(STEPS, *shape, seed=1))


def turn(size: int, seed: int = 2) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def gaussians(size: int, rank: int, gap: int) -> list[Tensor]:
    return [normal(size, rank, seed=9 + step // gap) / rank**0.5 for step in range(STEPS)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rotated_adamw_on_the_identity_is_torchs_adamw(shape: tuple[int, int]) -> None:
    weight, gradients = problem(shape)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], **ADAM)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    got = adamw_rotated(weight, gradients, torch.eye(min(shape)), **ADAM)
    torch.testing.assert_close(got, parameter.detach(), **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_and_without_refresh_every_projected_adam_is_rotated_adamw(shape: tuple[int, int]) -> None:
    weight, gradients = problem(shape)
    size = min(shape)
    frames = svd_frames(gradients, size, {0})
    expected = adamw_rotated(weight, gradients, frames[0], **ADAM)
    for run in (galore, fira):
        torch.testing.assert_close(run(weight, gradients, frames, **ADAM), expected, **EXACT)
    for error_feedback in (True, False):
        run = ldadam(weight, gradients, frames=frames, error_feedback=error_feedback, **ADAM)
        torch.testing.assert_close(run.weight, expected, **EXACT)
    basis = turn(size)
    got = dct_adamw(weight, gradients, basis, rank=size, refreshes=range(STEPS), **ADAM)
    torch.testing.assert_close(got.weight, adamw_rotated(weight, gradients, basis, **ADAM), **EXACT)


REFERENCES: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "galore": lambda w, g: galore(w, g, svd_frames(g, 2, {0, 4}), alpha=0.25, **ADAM),
    "fira": lambda w, g: fira(w, g, svd_frames(g, 2, {0, 4}), alpha=0.25, **ADAM),
    "apollo": lambda w, g: apollo(w, g, gaussians(4, 2, 3), **ADAM),
    "apollo_mini": lambda w, g: apollo_mini(w, g, gaussians(4, 1, 3), **ADAM),
    "ldadam": lambda w, g: ldadam(w, g, rank=2, **ADAM).weight,
    "dct_adamw": lambda w, g: dct_adamw(w, g, dct_basis(4), rank=2, refreshes=range(0, STEPS, 2), **ADAM).weight,
    "trion": lambda w, g: trion(w, g, dct_basis(4), rank=2, lr=0.1, scale="kimi").weight,
}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_a_wide_matrix_moves_like_its_tall_transpose(reference: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    weight, gradients = problem((7, 4))
    wide = reference(weight.T, [g.T for g in gradients])
    torch.testing.assert_close(wide.T, reference(weight, gradients), **EXACT)


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_arguments_are_left_alone(reference: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    weight, gradients = problem((7, 4))
    reference(weight, gradients)
    torch.testing.assert_close((weight, *gradients), (problem((7, 4))[0], *problem((7, 4))[1]), atol=0, rtol=0)


def test_a_schedule_of_equal_rates_is_one_rate() -> None:
    weight, gradients = problem((7, 4))
    frames = svd_frames(gradients, 2, {0})
    many, one = galore(weight, gradients, frames, lr=[0.1] * STEPS), galore(weight, gradients, frames, lr=0.1)
    assert torch.equal(many, one)


def test_svd_frames_change_at_refreshes_only_and_capture_most() -> None:
    _, gradients = problem((4, 7))
    frames = svd_frames(gradients, 2, {0, 5})
    assert [a is b for a, b in itertools.pairwise(frames)] == [step != 5 for step in range(1, STEPS)]
    captured = (tall(gradients[5]) @ frames[5]).square().sum()
    torch.testing.assert_close(captured, torch.linalg.svdvals(gradients[5])[:2].square().sum())


def test_galores_first_step_by_hand() -> None:
    # coordinates of the only direction (0.6, 0.8) are 5 and -10; Adam's first step is their sign
    gradient = torch.tensor([[3.0, 4.0], [-6.0, -8.0]])
    got = galore(torch.zeros(2, 2), [gradient], [torch.tensor([[0.6], [0.8]])], lr=0.1, alpha=0.5, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[-0.03, -0.04], [0.03, 0.04]], dtype=torch.float64))


def test_firas_first_step_by_hand() -> None:
    # the frame is the first axis: Adam gives its column the sign, the other column is scaled by 1 / |first|
    gradient = torch.tensor([[4.0, 2.0], [-0.5, 3.0], [0.0, 7.0]])
    got = fira(torch.zeros(3, 2), [gradient], [torch.tensor([[1.0], [0.0]])], lr=0.1, alpha=0.5, eps=1e-300, bound=None)
    expected = -0.05 * torch.tensor([[1.0, 0.5], [-1.0, 6.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


def test_the_limiter_holds_growth_and_lets_everything_else_pass() -> None:
    before, small, large = 3**0.5, torch.full((3,), -1.005), torch.full((3,), -5.0)
    for update, norm, gamma in ((large, 0.0, 1.01), (large, before, None), (small, before, 1.01)):
        got, after = limited(update, norm, gamma)
        assert got is update
        assert after == update.norm().item()
    got, after = limited(large, before, 1.01)
    torch.testing.assert_close(got, torch.full((3,), -1.01))
    assert after == pytest.approx(1.01 * before)


def test_a_step_without_an_update_does_not_count_for_the_limiter() -> None:
    nothing, after = limited(torch.zeros(3), 2.0, 1.01)
    assert not nothing.any()
    assert after == 2.0


def test_a_row_that_leaves_the_frame_is_rescaled_to_the_bound_and_others_as_published() -> None:
    frame = torch.eye(8)[:, :2]  # sqrt(N / R) = 2
    above, below, outside = (
        torch.full((4,), 3.0),
        torch.tensor([1.0, 1e-3, 0.0, 0.0]),
        torch.tensor([7.9, 5.0, 5.0, 0.0]),
    )
    got = row_scale(above, below, outside, frame, 4.0)
    torch.testing.assert_close(got * outside, torch.tensor([3 * 7.9, 24.0, 24.0, 0.0]))
    free = row_scale(above, below, outside, frame, None)
    torch.testing.assert_close(free, 3 / (below + 1e-8))


def test_firas_residual_grows_by_gamma_a_step_at_most() -> None:
    weight, frame = torch.zeros(6, 3, dtype=torch.float64), turn(3)[:, :1]
    outside = torch.eye(3) - frame @ frame.T
    gradients = [normal(6, 3), normal(6, 3) @ (frame @ frame.T + 100 * outside)]
    steps = [fira(weight, gradients[:n], [frame] * n, lr=1.0, bound=None) for n in range(3)]
    first, second = ((after - before) @ outside for before, after in itertools.pairwise(steps))
    torch.testing.assert_close(second.norm(), 1.01 * first.norm())
    free = fira(weight, gradients, [frame] * 2, lr=1.0, gamma=None, bound=None)
    assert ((free - steps[1]) @ outside).norm() > 50 * first.norm()


def test_apollo_moves_every_row_along_its_gradient() -> None:
    weight, gradients = problem((7, 4))
    moved = weight - apollo(weight, gradients[:1], gaussians(4, 2, 3)[:1], lr=0.1, eps=0.0)
    along = (moved * gradients[0]).sum(dim=1) / gradients[0].norm(dim=1)
    torch.testing.assert_close(along, moved.norm(dim=1))
    # Adam's first direction is a sign, of length sqrt(rank) in every row
    sizes = 0.1 * 2**0.5 * gradients[0].norm(dim=1) / (gradients[0] @ gaussians(4, 2, 3)[0]).norm(dim=1)
    torch.testing.assert_close(moved.norm(dim=1), sizes)


def test_apollo_on_an_orthogonal_projection_gives_rows_the_length_of_rotated_adamw() -> None:
    weight, gradients = problem((7, 4))
    frame, rules = turn(4), {"lr": 0.1, "betas": BETAS}

    def lengths_of_last_step(run: Callable[[int], Tensor]) -> Tensor:
        return (run(STEPS) - run(STEPS - 1)).norm(dim=1)

    ours = lengths_of_last_step(lambda n: apollo(weight, gradients[:n], [frame] * n, gamma=None, **rules))
    full = lengths_of_last_step(lambda n: adamw_rotated(weight, gradients[:n], frame, **rules))
    torch.testing.assert_close(ours, full)


def test_apollo_mini_first_step_by_hand() -> None:
    # R = (3, -4): Adam's signs have norm sqrt(2), so s = sqrt(2) / 5 and sqrt(128) s = 16 / 5
    gradient = torch.tensor([[3.0, 1.0], [-4.0, 2.0]])
    got = apollo_mini(torch.zeros(2, 2), [gradient], [torch.tensor([[1.0], [0.0]])], lr=0.1, eps=0.0)
    torch.testing.assert_close(got, -0.32 * gradient.double())


def test_apollo_limits_the_growth_of_its_update() -> None:
    weight, gradients = problem((7, 4))
    gradients[1] = gradients[1] * 1000
    steps = [apollo(weight, gradients[:n], gaussians(4, 2, 3)[:n], lr=1.0, betas=(0.9, 0.0)) for n in range(3)]
    first, second = steps[1] - steps[0], steps[2] - steps[1]
    assert second.norm() <= 1.01 * first.norm() * (1 + 1e-12)


def test_moments_of_one_direction_follow_it_through_any_change_of_basis() -> None:
    # a gradient that never changes has no variance: turned back and forth, its moments are exact
    g, frames, t = normal(5, 3), [turn(3, seed) for seed in range(4)], 6
    m, v = (1 - BETAS[0] ** t) * g @ frames[0], (1 - BETAS[1] ** t) * (g @ frames[0]) ** 2
    for old, new in itertools.pairwise(frames):
        m, v = rotated_moments(m, v, old.T @ new, t, BETAS)
    torch.testing.assert_close(m, (1 - BETAS[0] ** t) * g @ frames[-1], **EXACT)
    torch.testing.assert_close(v, (1 - BETAS[1] ** t) * (g @ frames[-1]) ** 2, **EXACT)


def test_a_permuted_frame_permutes_the_moments() -> None:
    m, v, order = normal(5, 3), normal(5, 3, seed=1).abs() + 9, torch.tensor([2, 0, 1])
    got = rotated_moments(m, v, torch.eye(3, dtype=torch.float64)[:, order], 4, BETAS)
    torch.testing.assert_close(got, (m[:, order], v[:, order]), **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam_loses_no_gradient(shape: tuple[int, int]) -> None:
    # sum of its three rules over the steps: sum G = E_T + sum_{t<T} M_t + M_T / (1 - b1), with M_t = m_t Q_t^T
    weight, gradients = problem(shape)
    run = ldadam(weight, gradients, rank=2, **ADAM)
    momenta = [m @ q.T for (m, _), q in zip(run.moments, run.frames, strict=True)]
    accounted = run.buffers[-1] + sum(momenta[:-1]) + momenta[-1] / (1 - BETAS[0])
    torch.testing.assert_close(sum(tall(g) for g in gradients), accounted, **EXACT)


def test_ldadam_with_its_own_frames_given_back_is_the_same() -> None:
    weight, gradients = problem((7, 4))
    own = ldadam(weight, gradients, rank=2, **ADAM)
    assert torch.equal(ldadam(weight, gradients, frames=own.frames, **ADAM).weight, own.weight)


def test_ldadams_frame_is_orthonormal_and_settles_on_the_top_singular_vectors() -> None:
    a = turn(6)[:, :4] @ torch.diag(torch.tensor([9.0, 8.0, 2.0, 1.0], dtype=torch.float64)) @ turn(4, 3).T
    frame = turn(4, 5)[:, :2]
    for _ in range(40):
        frame = ldadam_frame(a, frame, a @ frame, rank=2, rho=0.5)
        torch.testing.assert_close(frame.T @ frame, torch.eye(2, dtype=torch.float64), **EXACT)
    top = ldadam_frame(a, None, None, rank=2, rho=0.5)
    torch.testing.assert_close(frame @ frame.T, top @ top.T, atol=1e-8, rtol=0)


def test_the_dct_basis_is_scipys_transform() -> None:
    fft = pytest.importorskip("scipy.fft")
    for size in (1, 2, 7, 8):
        x = normal(3, size)
        torch.testing.assert_close(x @ dct_basis(size), torch.from_numpy(fft.dct(x.numpy(), norm="ortho")), **EXACT)


def test_columns_selected_by_their_l2_norm_leave_the_least_behind() -> None:
    a, basis = normal(5, 6), turn(6)
    left = {
        columns: (a - a @ basis[:, columns] @ basis[:, columns].T).norm().item()
        for columns in itertools.combinations(range(6), 2)
    }
    assert tuple(selected(a, basis, 2, norm=2).tolist()) == min(left, key=lambda columns: left[columns])
    one_large, all_medium = torch.tensor([[3.0, 2.0], [0.0, 2.0], [0.0, 0.0]]).double(), torch.eye(2).double()
    assert selected(one_large, all_medium, 1, norm=1).tolist() == [1]
    assert selected(one_large, all_medium, 1, norm=2).tolist() == [0]


@pytest.mark.parametrize("norm", [1, 2])
def test_dct_adamw_keeps_what_it_does_not_apply(norm: int) -> None:
    weight, gradients = problem((4, 7))
    run = dct_adamw(weight, gradients, dct_basis(4), rank=2, refreshes={0, 3, 6}, norm=norm, **ADAM)
    error = torch.zeros(7, 4, dtype=torch.float64)
    for gradient, q, kept in zip(gradients, run.frames, run.buffers, strict=True):
        a = tall(gradient) + error
        torch.testing.assert_close(kept + a @ q @ q.T, a, **EXACT)
        error = kept
    assert not dct_adamw(weight, gradients, dct_basis(4), rank=2, refreshes={0}, error_feedback=False, **ADAM).buffers


def test_rotation_moves_surviving_moments_to_their_columns_and_starts_new_ones_at_zero() -> None:
    # columns 0 and 1 are selected first, then 1 and 2; beta = 1/2 halves the old moment and adds half the coordinate
    gradients = [torch.tensor([[5.0, 4.0, 1.0]]).repeat(3, 1), torch.tensor([[1.0, 4.0, 5.0]]).repeat(3, 1)]
    weight = torch.zeros(3, 3)
    moved, left = (
        dct_adamw(
            weight, gradients, torch.eye(3), lr=0.1, rank=2, refreshes={0, 1}, rotate=rotate, betas=(0.5, 0.5),
            error_feedback=False,
        )
        for rotate in (True, False)
    )  # fmt: skip
    first, second = moved.moments[0][0], moved.moments[1][0]
    assert first[0].tolist() == [2.5, 2.0]
    assert second[0].tolist() == [0.5 * 2.0 + 2.0, 2.5]
    assert left.moments[1][0][0].tolist() == [0.5 * 2.5 + 2.0, 0.5 * 2.0 + 2.5]


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (8, 8)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    # five steps of these coefficients map [0.01, 1] into [0.68, 1.14]; they do not converge to 1
    u, s, vh = torch.linalg.svd(normal(*shape), full_matrices=False)
    got = u.T @ newton_schulz(u @ torch.diag(s.clamp_min(0.1 * s.max())) @ vh) @ vh.T
    values = got.diagonal()
    assert values.min() > 0.68
    assert values.max() < 1.14
    torch.testing.assert_close(got, torch.diag(values), **EXACT)


def test_trion_at_full_rank_is_momentum_orthogonalised() -> None:
    weight, gradients = problem((7, 4))
    expected, momentum = weight.clone(), torch.zeros(7, 4, dtype=torch.float64)
    for gradient in gradients:
        momentum = momentum + gradient
        expected = 0.99 * expected - 0.1 * math.sqrt(7 / 4) * newton_schulz(momentum)
        momentum = 0.9 * momentum
    run = trion(weight, gradients, turn(4), rank=4, lr=0.1, mu=0.9, scale="dion", weight_decay=0.1)
    # newton_schulz(B Q) Q^T = newton_schulz(B): it commutes with rotations
    torch.testing.assert_close(run.weight, expected, **EXACT)
    torch.testing.assert_close(run.buffers[-1], momentum, **EXACT)


def test_trion_decays_only_what_it_applied() -> None:
    weight, gradients = problem((7, 4))
    run = trion(weight, gradients, dct_basis(4), rank=2, lr=0.1, mu=0.8)
    before = torch.zeros(7, 4, dtype=torch.float64)
    for gradient, q, momentum in zip(gradients, run.frames, run.buffers, strict=True):
        b = before + gradient
        torch.testing.assert_close(momentum @ q, 0.8 * b @ q, **EXACT)
        torch.testing.assert_close(momentum - momentum @ q @ q.T, b - b @ q @ q.T, **EXACT)
        before = momentum


def test_scales_of_an_orthogonal_update_by_hand() -> None:
    for scale, tall_scale, wide_scale in (("kj", 2.0, 1.0), ("kimi", 0.8, 0.8), ("dion", 2.0, 0.5), (None, 1.0, 1.0)):
        assert trion_scale(torch.Size((16, 4)), scale) == pytest.approx(tall_scale)
        assert trion_scale(torch.Size((4, 16)), scale) == pytest.approx(wide_scale)


def test_orientation_is_undone() -> None:
    for shape in SHAPES:
        weight = normal(*shape)
        assert torch.equal(as_given(tall(weight), weight), weight)
