import math

import pytest
import torch
from torch import Tensor

from lightspan.objectives.diffusion import (
    add_noise,
    cosine_kept,
    linear_kept,
    noise_of_velocity,
    prediction_loss,
    step_back,
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
