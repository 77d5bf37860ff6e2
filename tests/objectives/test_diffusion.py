import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightspan.objectives.diffusion import (
    add_noise,
    cosine_kept,
    linear_kept,
    noise_of_velocity,
    prediction_loss,
    scaled_linear_kept,
    step_back,
    variance_ends,
    variance_loss,
    velocity,
)

SCHEDULES = pytest.mark.parametrize("kept_T", [linear_kept(1000), cosine_kept(1000), cosine_kept(50)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@SCHEDULES
def test_kept_falls_from_nearly_all_to_nearly_nothing(kept_T: Tensor) -> None:
    assert 0.99 < kept_T[0] < 1
    assert 0 < kept_T[-1] < 1e-4
    assert (kept_T.diff() < 0).all()
    assert (kept_T[1:] / kept_T[:-1]).min() >= 1 - 0.999 - 1e-12


def test_schedules_are_the_published_ones() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert linear_kept(1000)[499].item() == pytest.approx(math.prod((1 - betas[:500]).tolist()))
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    assert scaled_linear_kept(1000)[499].item() == pytest.approx(math.prod((1 - roots[:500] ** 2).tolist()))
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert cosine_kept(1000)[499].item() == pytest.approx(f[500] / f[0])


@SCHEDULES
def test_noising_keeps_unit_variance_and_the_named_share(kept_T: Tensor) -> None:
    clean, noise = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
    for level in (0, len(kept_T) // 2, -1):
        image, grain = add_noise(clean, noise, kept_T[level].expand(2)).flatten()
        assert image**2 + grain**2 == pytest.approx(1)
        assert image**2 == pytest.approx(kept_T[level])


def test_each_image_has_its_own_level() -> None:
    clean, noise, kept = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), torch.tensor([1.0, 0.5, 0.1])
    noisy = add_noise(clean, noise, kept)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[1:2], add_noise(clean[1:2], noise[1:2], kept[1:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [1 - 1e-4, 1 - 1e-3, 0.5, 1e-4])
def test_half_precision_images_get_the_noise_of_their_level(kept: float, dtype: torch.dtype) -> None:
    kept_B = torch.tensor([kept])
    one, zero = torch.ones(1, 1).to(dtype), torch.zeros(1, 1).to(dtype)
    image, grain = math.sqrt(kept), math.sqrt(1 - kept)
    rel = float(torch.finfo(dtype).eps)
    for got, expected in (
        (add_noise(zero, one, kept_B), grain),
        (add_noise(one, zero, kept_B), image),
        (velocity(one, zero, kept_B), -grain),
        (noise_of_velocity(zero, one, kept_B), grain),
        (step_back(zero, one, kept_B, torch.ones(1), 0.0, zero), -grain / image),
    ):
        assert got.dtype == dtype
        assert got.item() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_level_without_noise_is_stepped_back_to_itself(eta: float) -> None:
    noisy, predicted, fresh = (draw(4, 1, 3, 3, seed=seed).float() for seed in range(3))
    for clip in (None, (torch.tensor(-0.5), torch.tensor(0.5))):
        stepped = step_back(noisy, predicted, torch.ones(4), torch.ones(4), eta, fresh, clip)
        torch.testing.assert_close(stepped, noisy if clip is None else noisy.clamp(*clip), rtol=0, atol=1e-6)


def test_velocity_is_the_derivative_of_the_noisy_image_by_its_angle_and_gives_the_noise_back() -> None:
    clean, noise, kept = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), torch.tensor([1.0, 0.5, 0.1]).double()
    angle = kept.sqrt().acos()
    _, derivative = torch.func.jvp(
        lambda a: add_noise(clean, noise, a.cos().square()), (angle[1:2],), (angle[1:2] * 0 + 1,)
    )
    v = velocity(clean, noise, kept)
    torch.testing.assert_close(v[1:2], derivative[1:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(noise_of_velocity(v, add_noise(clean, noise, kept), kept), noise, rtol=0, atol=1e-12)


def test_the_loss_is_a_mean_and_widens_half_precision() -> None:
    assert prediction_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == pytest.approx(2.5)
    assert prediction_loss(torch.full((3,), 300.0).half(), torch.zeros(3).half()).item() == 90_000


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_step_with_the_true_noise_lands_on_the_same_image_at_the_next_level(eta: float) -> None:
    clean, noise, fresh = draw(4, 1, 3, 3), draw(4, 1, 3, 3, seed=1), draw(4, 1, 3, 3, seed=2)
    kept, following = torch.full((4,), 0.3).double(), torch.full((4,), 0.7).double()
    stepped = step_back(add_noise(clean, noise, kept), noise, kept, following, eta, fresh)
    grain = (stepped - following[0].sqrt() * clean) / (1 - following[0]).sqrt()
    if eta == 0:
        torch.testing.assert_close(grain, noise, rtol=0, atol=1e-12)
    parts = torch.stack([noise.flatten(), fresh.flatten()], dim=1)
    old, new = torch.linalg.lstsq(parts, grain.flatten()).solution.tolist()
    assert old**2 + new**2 == pytest.approx(1)
    assert stepped.shape == clean.shape
    last = step_back(add_noise(clean, noise, kept), noise, kept, torch.ones(4), eta, fresh)
    torch.testing.assert_close(last, clean, rtol=0, atol=1e-12)


def test_the_ancestral_step_has_the_mean_and_variance_of_ddpm() -> None:
    kept_T, t = linear_kept(1000), 400
    beta = 1 - kept_T[t] / kept_T[t - 1]
    noisy, predicted, zero = draw(5, 2), draw(5, 2, seed=1), torch.zeros(5, 2).double()
    here, following = kept_T[t].expand(5), kept_T[t - 1].expand(5)
    mean = (noisy - beta / (1 - kept_T[t]).sqrt() * predicted) / (1 - beta).sqrt()
    torch.testing.assert_close(step_back(noisy, predicted, here, following, 1.0, zero), mean, rtol=0, atol=1e-12)
    deviation = step_back(noisy, predicted, here, following, 1.0, zero + 1) - mean
    variance = beta * (1 - kept_T[t - 1]) / (1 - kept_T[t])
    torch.testing.assert_close(deviation.square(), variance.expand(5, 2), rtol=1e-9, atol=0)


INFINITE = (torch.tensor(-math.inf), torch.tensor(math.inf))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_an_infinite_range_clips_nothing_to_the_last_bit(eta: float) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        noisy, predicted, fresh = (draw(4, 1, 3, 3, seed=seed).to(dtype) for seed in range(3))
        step = noisy, predicted, torch.full((4,), 0.3), torch.full((4,), 0.7), eta, fresh
        clipped = step_back(*step, clip=INFINITE)
        assert clipped.dtype == dtype
        assert torch.equal(clipped, step_back(*step))


def test_the_noise_is_what_the_clipped_image_implies() -> None:
    noisy, predicted, zero = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), torch.zeros(4, 2, 3, 3).double()
    kept, following = torch.full((4,), 0.25).double(), torch.full((4,), 0.7).double()
    least, greatest = torch.tensor([[-0.5, -0.1], [0.2, 0.3]]).double().view(2, 2, 1, 1)  # a channel each
    stepped = step_back(noisy, predicted, kept, following, 0.0, zero, clip=(least, greatest))
    clean = ((noisy - math.sqrt(0.75) * predicted) / 0.5).clamp(least, greatest)
    assert (clean == least).any()
    assert (clean == greatest).any()
    noise = (noisy - 0.5 * clean) / math.sqrt(0.75)
    torch.testing.assert_close(stepped, add_noise(clean, noise, following), rtol=0, atol=1e-12)
    last = step_back(noisy, predicted, kept, torch.ones(4), 0.0, zero, clip=(least, greatest))
    assert torch.equal(last, clean)


def test_the_clipped_ancestral_step_is_the_posterior_of_ddpm() -> None:
    kept_T, t = linear_kept(1000), 400
    before, here = kept_T[t - 1], kept_T[t]
    beta = 1 - here / before
    noisy, predicted, zero = draw(5, 2), draw(5, 2, seed=1), torch.zeros(5, 2).double()
    clip = torch.tensor(-0.4).double(), torch.tensor(0.6).double()
    clean = ((noisy - (1 - here).sqrt() * predicted) / here.sqrt()).clamp(*clip)
    mean = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - here)
    stepped = step_back(noisy, predicted, here.expand(5), before.expand(5), 1.0, zero, clip)
    torch.testing.assert_close(stepped, mean, rtol=0, atol=1e-12)


def posterior(kept_T: Tensor, level: int, clean: Tensor, noisy: Tensor) -> tuple[Tensor, float, float]:
    """Mean of the step back that knows this clean image, beta~ and beta: 2006.11239, eq. 6 and 7."""
    here, before = kept_T[level].item(), kept_T[level - 1].item() if level else 1.0
    beta = 1 - here / before
    mean = (before**0.5 * beta * clean + (here / before) ** 0.5 * (1 - before) * noisy) / (1 - here)
    return mean, beta * (1 - before) / (1 - here), beta


@pytest.mark.parametrize("kept_T", [linear_kept(1000), cosine_kept(50)])
def test_the_variance_loss_is_the_term_of_the_bound_in_bits(kept_T: Tensor) -> None:
    noise, predicted, share = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1), draw(1, 3, 4, 4, seed=2)
    clean = draw(1, 3, 4, 4, seed=3).clamp(-1, 1)  # both ends are among them
    first = posterior(kept_T, 1, clean, clean)[1]
    for level in (0, 1, len(kept_T) // 2, len(kept_T) - 1):
        kept_B = kept_T[level : level + 1]
        noisy = add_noise(clean, noise, kept_B)
        true, least, greatest = posterior(kept_T, level, clean, noisy)
        least = least or first
        implied = (noisy - (1 - kept_B).sqrt() * predicted) / kept_B.sqrt()
        said = posterior(kept_T, level, implied, noisy)[0]
        spread = torch.exp((1 + share) / 2 * math.log(greatest) + (1 - share) / 2 * math.log(least)).sqrt()
        if level:
            terms = kl_divergence(Normal(true, least**0.5), Normal(said, spread))
        else:
            below, above = (Normal(said, spread).cdf(clean + side / 255) for side in (-1, 1))
            terms = -torch.where(clean == -1, above, torch.where(clean == 1, 1 - below, above - below)).log()
        ends_2B = variance_ends(kept_T)[:, level : level + 1]
        bits = variance_loss(predicted, share, noise, clean, kept_B, ends_2B, torch.tensor([level == 0]))
        assert bits.item() == pytest.approx(terms.mean().item() / math.log(2), rel=1e-7)


def test_the_variance_loss_is_least_at_the_variance_of_what_is_missed_and_moves_nothing_else() -> None:
    kept_T = linear_kept(1000)
    level = torch.tensor([0, 400])
    noise = draw(2, 1, 4, 4)
    predicted, share = (draw(2, 1, 4, 4, seed=seed).requires_grad_() for seed in (1, 2))
    rest = noise, draw(2, 1, 4, 4, seed=3), kept_T[level], variance_ends(kept_T)[:, level], level == 0
    variance_loss(predicted, share, *rest).backward()
    assert predicted.grad is None
    assert share.grad is not None
    assert share.grad.all()
    torch.autograd.gradcheck(lambda share: variance_loss(predicted, share, *rest), [share])
    # Of a perfect prediction the posterior's variance, and there is nothing to pay.
    exact = [
        variance_loss(noise[1:], torch.full_like(noise[1:], v), noise[1:], *one_of(rest)) for v in (-1.1, -1, -0.9)
    ]
    assert exact[1] == 0 < min(exact[0], exact[2])


def one_of(rest: tuple[Tensor, ...]) -> list[Tensor]:
    _, clean, kept_B, ends_2B, last_B = rest
    return [clean[1:], kept_B[1:], ends_2B[:, 1:], last_B[1:]]


def test_a_share_that_has_run_away_leaves_the_variance_loss_and_its_gradient_finite() -> None:
    kept_T = linear_kept(1000).float()
    for level, far in ((0, 60.0), (0, 1e3), (400, 1e3), (999, -60.0)):
        for dtype in (torch.float32, torch.bfloat16):
            noise = draw(1, 1, 2, 2).to(dtype)
            share = torch.full((1, 1, 2, 2), far, dtype=dtype, requires_grad=True)
            at = slice(level, level + 1)
            ends_2B = variance_ends(kept_T).float()[:, at]
            loss = variance_loss(noise + 1, share, noise, noise, kept_T[at], ends_2B, torch.tensor([level == 0]))
            loss.backward()
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert share.grad is not None
            assert share.grad.isfinite().all()


def test_fresh_noise_is_as_wide_as_a_learned_variance_says() -> None:
    kept_T, t = linear_kept(1000), 400
    noisy, predicted, share, zero = draw(5, 2), draw(5, 2, seed=1), draw(5, 2, seed=2), torch.zeros(5, 2).double()
    here, following = kept_T[t].expand(5), kept_T[t - 1].expand(5)
    step = partial(step_back, noisy, predicted, here, following, 1.0, share=share)
    least, greatest = variance_ends(kept_T)[:, t]
    expected = torch.exp(least + (share + 1) / 2 * (greatest - least))
    torch.testing.assert_close((step(zero + 1) - step(zero)).square(), expected, rtol=1e-9, atol=0)
    # The least variance is DDPM's smaller one, and the last step draws nothing.
    smallest = step_back(noisy, predicted, here, following, 1.0, zero + 1, share=torch.full_like(share, -1))
    assert torch.equal(smallest, step_back(noisy, predicted, here, following, 1.0, zero + 1))
    last = step_back(noisy, predicted, kept_T[:1].expand(5), torch.ones(5).double(), 1.0, zero + 1, share=1e4 * share)
    assert torch.equal(last, step_back(noisy, predicted, kept_T[:1].expand(5), torch.ones(5).double(), 1.0, zero))
