"""The slow references themselves: cases in which a published optimiser is a known one, invariants, values by hand."""

import inspect
import io
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from optim.rotated import adamw_rotated
from torch import Tensor

from lightspan.optim import reference
from lightspan.optim.reference import (
    APOLLO,
    APOLLOMini,
    DCTAdamW,
    Dion2,
    FiraAdam,
    GaLore,
    LDAdam,
    LowRank,
    Muon,
    NorMuon,
    Reference,
    Trion,
    run,
)
from lightspan.optim.reference.dct import dct_basis, selected
from lightspan.optim.reference.ldadam import power_step, rotated_moments
from lightspan.optim.reference.loop import as_given, tall
from lightspan.optim.reference.newton_schulz import newton_schulz, shape_factor
from lightspan.optim.reference.rescaling import limited, row_scale

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
    frames = [turn(size)] * STEPS
    expected = adamw_rotated(weight, gradients, frames[0], **ADAM)
    rules: list[tuple[type[Reference], dict[str, float]]] = [
        (GaLore, {"scale": 1.0}), (FiraAdam, {"scale": 1.0}), (LowRank, {}), (LDAdam, {})
    ]  # fmt: skip
    for kind, settings in rules:
        got = run(kind, weight, gradients, frames=frames, **ADAM, **settings)
        torch.testing.assert_close(got.weight, expected, **EXACT)
    basis = turn(size)
    got = run(DCTAdamW, weight, gradients, rank=size, basis=lambda _: basis, **ADAM)
    torch.testing.assert_close(got.weight, adamw_rotated(weight, gradients, basis, **ADAM), **EXACT)


REFERENCES: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "GaLore": lambda w, g: run(GaLore, w, g, rank=2, refresh=4, **ADAM).weight,
    "FiraAdam": lambda w, g: run(FiraAdam, w, g, rank=2, refresh=4, **ADAM).weight,
    "APOLLO": lambda w, g: run(APOLLO, w, g, rank=2, refresh=3, **ADAM).weight,
    "APOLLOMini": lambda w, g: run(APOLLOMini, w, g, refresh=3, **ADAM).weight,
    "LDAdam": lambda w, g: run(LDAdam, w, g, rank=2, **ADAM).weight,
    "DCTAdamW": lambda w, g: run(DCTAdamW, w, g, rank=2, refresh=2, **ADAM).weight,
    "Trion": lambda w, g: run(Trion, w, g, rank=2, lr=0.1, convention="kimi").weight,
    "LowRank": lambda w, g: run(LowRank, w, g, rank=2, refresh=4, **ADAM).weight,
    "Muon": lambda w, g: run(Muon, w, g, lr=0.1, convention="kimi").weight,
    "Dion2": lambda w, g: run(Dion2, w, g, lr=0.1, convention="kimi").weight,
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
    many, one = (run(GaLore, weight, gradients, rank=2, lr=lr).weight for lr in ([0.1] * STEPS, 0.1))
    assert torch.equal(many, one)


def test_svd_frames_change_at_refreshes_only_and_capture_most() -> None:
    weight, gradients = problem((4, 7))
    frames = run(GaLore, weight, gradients, rank=2, refresh=5, lr=0.1).frames
    assert [a is b for a, b in itertools.pairwise(frames)] == [step != 5 for step in range(1, STEPS)]
    captured = (tall(gradients[5]) @ frames[5]).square().sum()
    torch.testing.assert_close(captured, torch.linalg.svdvals(gradients[5])[:2].square().sum())


def test_galores_first_step_by_hand() -> None:
    # coordinates of the only direction (0.6, 0.8) are 5 and -10; Adam's first step is their sign
    gradient = torch.tensor([[3.0, 4.0], [-6.0, -8.0]])
    frames = [torch.tensor([[0.6], [0.8]])]
    got = run(GaLore, torch.zeros(2, 2), [gradient], frames=frames, lr=0.1, scale=0.5, eps=0.0)
    torch.testing.assert_close(got.weight, torch.tensor([[-0.03, -0.04], [0.03, 0.04]], dtype=torch.float64))


def test_firas_first_step_by_hand() -> None:
    # the frame is the first axis: Adam gives its column the sign, the other column is scaled by 1 / |first|
    gradient = torch.tensor([[4.0, 2.0], [-0.5, 3.0], [0.0, 7.0]])
    frames = [torch.tensor([[1.0], [0.0]])]
    got = run(FiraAdam, torch.zeros(3, 2), [gradient], frames=frames, lr=0.1, scale=0.5, eps=1e-300).weight
    expected = -0.05 * torch.tensor([[1.0, 0.5], [-1.0, 6.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


def test_the_limiter_holds_growth_and_lets_everything_else_pass() -> None:
    before, small, large = 3**0.5, torch.full((3,), -1.005), torch.full((3,), -5.0)
    for update, norm, gamma in ((large, 0.0, 1.01), (large, before, None), (small, before, 1.01)):
        state = {"norm": norm}
        assert limited(update, state, gamma) is update
        assert state["norm"] == update.norm().item()
    state = {"norm": before}
    torch.testing.assert_close(limited(large, state, 1.01), torch.full((3,), -1.01))
    assert state["norm"] == pytest.approx(1.01 * before)


def test_a_step_without_an_update_does_not_count_for_the_limiter() -> None:
    state = {"norm": 2.0}
    assert not limited(torch.zeros(3), state, 1.01).any()
    assert state["norm"] == 2.0


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
    rules = {"lr": 1.0, "scale": 1.0}
    steps = [run(FiraAdam, weight, gradients[:n], frames=[frame] * n, **rules).weight for n in range(3)]
    first, second = ((after - before) @ outside for before, after in itertools.pairwise(steps))
    torch.testing.assert_close(second.norm(), 1.01 * first.norm())
    free = run(FiraAdam, weight, gradients, frames=[frame] * 2, limit=None, **rules).weight
    assert ((free - steps[1]) @ outside).norm() > 50 * first.norm()


def test_apollo_moves_every_row_along_its_gradient() -> None:
    weight, gradients = problem((7, 4))
    moved = weight - run(APOLLO, weight, gradients[:1], frames=gaussians(4, 2, 3)[:1], lr=0.1, eps=0.0).weight
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

    ours = lengths_of_last_step(
        lambda n: run(APOLLO, weight, gradients[:n], frames=[frame] * n, limit=None, **rules).weight
    )
    full = lengths_of_last_step(lambda n: adamw_rotated(weight, gradients[:n], frame, **rules))
    torch.testing.assert_close(ours, full)


def test_apollo_mini_first_step_by_hand() -> None:
    # R = (3, -4): Adam's signs have norm sqrt(2), so s = sqrt(2) / 5 and sqrt(128) s = 16 / 5
    gradient = torch.tensor([[3.0, 1.0], [-4.0, 2.0]])
    frames = [torch.tensor([[1.0], [0.0]])]
    got = run(APOLLOMini, torch.zeros(2, 2), [gradient], frames=frames, lr=0.1, eps=0.0).weight
    torch.testing.assert_close(got, -0.32 * gradient.double())


def test_apollo_limits_the_growth_of_its_update() -> None:
    weight, gradients = problem((7, 4))
    gradients[1] = gradients[1] * 1000
    frames, rules = gaussians(4, 2, 3), {"lr": 1.0, "betas": (0.9, 0.0)}
    steps = [run(APOLLO, weight, gradients[:n], frames=frames[:n], **rules).weight for n in range(3)]
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
    got = run(LDAdam, weight, gradients, rank=2, **ADAM)
    momenta = [m @ q.T for (m, _), q in zip(got.moments, got.frames, strict=True)]
    accounted = got.buffers[-1] + sum(momenta[:-1]) + momenta[-1] / (1 - BETAS[0])
    torch.testing.assert_close(sum(tall(g) for g in gradients), accounted, **EXACT)


def test_ldadam_with_its_own_frames_given_back_is_the_same() -> None:
    weight, gradients = problem((7, 4))
    own = run(LDAdam, weight, gradients, rank=2, **ADAM)
    assert torch.equal(run(LDAdam, weight, gradients, frames=own.frames, **ADAM).weight, own.weight)


def test_ldadams_frame_is_orthonormal_and_settles_on_the_top_singular_vectors() -> None:
    a = turn(6)[:, :4] @ torch.diag(torch.tensor([9.0, 8.0, 2.0, 1.0], dtype=torch.float64)) @ turn(4, 3).T
    frame = turn(4, 5)[:, :2]
    for _ in range(40):
        frame = power_step(a, frame, a @ frame, rho=0.5)
        torch.testing.assert_close(frame.T @ frame, torch.eye(2, dtype=torch.float64), **EXACT)
    top = turn(4, 3)[:, :2]  # the right singular vectors it was made of
    torch.testing.assert_close(frame @ frame.T, top @ top.T, atol=1e-8, rtol=0)


def test_the_dct_basis_is_scipys_transform() -> None:
    fft = pytest.importorskip("scipy.fft")
    for size in (1, 2, 7, 8):
        x = normal(3, size)
        torch.testing.assert_close(x @ dct_basis(size), torch.from_numpy(fft.dct(x.numpy(), norm="ortho")), **EXACT)


def test_dct_adamw_takes_the_published_codes_own_columns() -> None:
    """Those of the DCT-III matrix D^T, with a D^T = dct(a, type=3)."""
    fft = pytest.importorskip("scipy.fft")
    weight, gradients = problem((9, 6))
    settings = {"rank": 2, "norm": 1, "rotate": False, "error_feedback": False}
    got = run(DCTAdamW, weight, gradients, **settings, **ADAM, basis=lambda size: dct_basis(size).T)
    basis = torch.from_numpy(fft.dct(torch.eye(6).double().numpy(), type=3, norm="ortho"))
    for gradient, frame in zip(gradients, got.frames, strict=True):
        scores = torch.from_numpy(fft.dct(gradient.double().numpy(), type=3, norm="ortho")).abs().sum(dim=0)
        torch.testing.assert_close(frame, basis[:, scores.topk(2).indices.sort().values], **EXACT)


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
    got = run(DCTAdamW, weight, gradients, rank=2, refresh=3, norm=norm, **ADAM)
    error = torch.zeros(7, 4, dtype=torch.float64)
    for gradient, q, kept in zip(gradients, got.frames, got.buffers, strict=True):
        a = tall(gradient) + error
        torch.testing.assert_close(kept + a @ q @ q.T, a, **EXACT)
        error = kept
    assert not run(DCTAdamW, weight, gradients, rank=2, error_feedback=False, **ADAM).buffers


def test_rotation_moves_surviving_moments_to_their_columns_and_starts_new_ones_at_zero() -> None:
    # columns 0 and 1 are selected first, then 1 and 2; beta = 1/2 halves the old moment and adds half the coordinate
    gradients = [torch.tensor([[5.0, 4.0, 1.0]]).repeat(3, 1), torch.tensor([[1.0, 4.0, 5.0]]).repeat(3, 1)]
    weight = torch.zeros(3, 3)
    moved, left = (
        run(
            DCTAdamW, weight, gradients, lr=0.1, rank=2, rotate=rotate, betas=(0.5, 0.5), error_feedback=False,
            basis=torch.eye,
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
    settings = {"rank": 4, "lr": 0.1, "momentum": 0.9, "convention": "dion", "weight_decay": 0.1}
    got = run(Trion, weight, gradients, basis=lambda size: turn(size), **settings)
    # newton_schulz(B Q) Q^T = newton_schulz(B): it commutes with rotations
    torch.testing.assert_close(got.weight, expected, **EXACT)
    torch.testing.assert_close(got.buffers[-1], momentum, **EXACT)


def test_trion_decays_only_what_it_applied() -> None:
    weight, gradients = problem((7, 4))
    got = run(Trion, weight, gradients, rank=2, lr=0.1, momentum=0.8)
    before = torch.zeros(7, 4, dtype=torch.float64)
    for gradient, q, momentum in zip(gradients, got.frames, got.buffers, strict=True):
        b = before + gradient
        torch.testing.assert_close(momentum @ q, 0.8 * b @ q, **EXACT)
        torch.testing.assert_close(momentum - momentum @ q @ q.T, b - b @ q @ q.T, **EXACT)
        before = momentum


def test_muons_momentum_and_nesterov_by_hand() -> None:
    # a single number: what is orthogonalised has the sign of the momentum, or with Nesterov of what comes next
    gradients = [torch.tensor([[1.0]]), torch.tensor([[-1.5]])]  # M = 0.5, -0.5; ahead 0.75, -1.0
    size = newton_schulz(torch.ones(1, 1).double()).item()
    steps = [run(Muon, torch.zeros(1, 1), gradients[:n], lr=1.0, momentum=0.5) for n in (1, 2)]
    assert [step.buffers[-1].item() for step in steps] == [0.5, -0.5]
    assert [step.weight.item() for step in steps] == pytest.approx([-size, 0.0], abs=1e-6)
    slow = [torch.tensor([[1.0]]), torch.tensor([[-0.5]])]  # M = 0.5, 0.0 without Nesterov
    assert run(Muon, torch.zeros(1, 1), slow, lr=1.0, momentum=0.5, nesterov=False).weight.item() == pytest.approx(
        -size
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_normuons_first_step_has_rows_of_equal_length_and_muons_norm(shape: tuple[int, int]) -> None:
    gradient = [normal(*shape)]
    even, plain = (run(kind, torch.zeros(shape), gradient, lr=1.0).weight for kind in (NorMuon, Muon))
    lengths = even.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
    torch.testing.assert_close(even.norm(), plain.norm())
    torch.testing.assert_close(even / lengths[:, None], plain / plain.norm(dim=1, keepdim=True))


def test_dion2_of_all_columns_without_forgetting_steps_along_the_sum() -> None:
    weight, gradients = problem((7, 4))
    got = run(Dion2, weight, gradients, lr=0.1, fraction=1.0, momentum=0.9, convention="none")
    expected, momentum = weight.clone(), torch.zeros(7, 4, dtype=torch.float64)
    for gradient in gradients:
        momentum = momentum + gradient
        order = torch.tensor([2, 0, 3, 1])  # the order of columns makes no difference
        expected -= 0.1 * newton_schulz(momentum[:, order])[:, order.argsort()]
        momentum = 0.9 * momentum
    torch.testing.assert_close(got.weight, expected, **EXACT)


def test_scales_of_an_orthogonal_update_by_hand() -> None:
    for convention, tall_scale, wide_scale in (
        ("adamw", 0.2 * (64 / 3) ** 0.5, 0.2 * (64 / 3) ** 0.5),
        ("kj", 2.0, 1.0),
        ("kimi", 0.8, 0.8),
        ("dion", 2.0, 0.5),
        ("none", 1.0, 1.0),
    ):
        assert shape_factor((16, 4), convention) == pytest.approx(tall_scale)
        assert shape_factor((4, 16), convention) == pytest.approx(wide_scale)


def test_orientation_is_undone() -> None:
    for shape in SHAPES:
        weight = normal(*shape)
        assert torch.equal(as_given(tall(weight), weight), weight)


KINDS = [
    kind
    for name in reference.__all__
    if inspect.isclass(kind := getattr(reference, name)) and issubclass(kind, Reference) and kind is not Reference
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_steps_saved_and_loaded_and_more_steps_are_the_steps_of_one_run(
    kind: type[Reference], dtype: torch.dtype
) -> None:
    """Draws of APOLLO are no part of its state: it draws in the first step alone."""
    known = inspect.signature(kind).parameters
    options = {"weight_decay": 0.1} | ({"rank": 1 if kind is APOLLOMini else 2} if "rank" in known else {})
    if "refresh" in known or kind is APOLLOMini:
        options["refresh"] = 100 if issubclass(kind, APOLLO) else 3

    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(normal(*shape).to(dtype)) for shape in ((7, 4), (4, 7), (3, 2, 2, 2), (4,))]

    def steps(optimizer: Reference, weights: list[torch.nn.Parameter], numbers: range) -> None:
        for number in numbers:
            for weight in weights:
                weight.grad = normal(*weight.shape, seed=number).to(dtype)
            optimizer.step()

    straight, resumed = parameters(), parameters()
    first = kind(straight, **options)
    steps(first, straight, range(4))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    with torch.no_grad():
        for theirs, ours in zip(resumed, straight, strict=True):
            theirs.copy_(ours)
    steps(first, straight, range(4, 8))
    saved.seek(0)
    second = kind(resumed, **options)
    second.load_state_dict(torch.load(saved, weights_only=True))
    kept = [value for state in second.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert kept
    assert {value.dtype for value in kept} == {torch.float64}
    steps(second, resumed, range(4, 8))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(straight, resumed, strict=True))


def test_a_loaded_reference_keeps_nothing_in_common_with_what_it_was_given() -> None:
    weight, other = (torch.nn.Parameter(normal(7, 4).float()) for _ in range(2))
    first, second = GaLore([weight], rank=2), GaLore([other], rank=2)
    weight.grad = normal(7, 4, seed=1).float()
    first.step()
    given = first.state_dict()
    second.load_state_dict(given)
    for value in given["state"][0].values():
        if isinstance(value, Tensor):
            value.zero_()
    assert second.state[other]["m"].any()
    assert second.state[other]["q"].any()
