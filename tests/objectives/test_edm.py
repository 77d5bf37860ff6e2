import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.objectives import edm
from lightspan.objectives.diffusion import velocity

SIGMAS = torch.tensor([0.002, 0.3, 1.0, 7.0, 700.0], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_scales_are_those_of_the_paper(std: float) -> None:
    scale = edm.scales(SIGMAS, draw(5, 2, 3), std)
    for i, sigma in enumerate(SIGMAS.tolist()):
        total = math.sqrt(sigma**2 + std**2)
        assert scale.skip[i].item() == pytest.approx(std**2 / (sigma**2 + std**2), rel=1e-12)
        assert scale.out[i].item() == pytest.approx(-sigma * std / total, rel=1e-12)
        assert scale.into[i].item() == pytest.approx(1 / total, rel=1e-12)
        assert scale.level_B[i].item() == pytest.approx(math.log(sigma) / 4, rel=1e-12)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_what_a_network_reads_and_what_it_learns_have_variance_1_at_every_level(std: float) -> None:
    clean, noise = std * draw(5, 20_000), draw(5, 20_000, seed=1)
    scale = edm.scales(SIGMAS, clean, std)
    read = scale.into * edm.with_noise(clean, noise, SIGMAS)
    learned = edm.target(clean, noise, SIGMAS, std)
    for of in (read, learned):
        torch.testing.assert_close(of.var(dim=1), torch.ones(5, dtype=torch.float64), rtol=0.03, atol=0)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_the_target_is_what_makes_the_denoiser_exact_and_the_weight_makes_the_loss_plain(std: float) -> None:
    clean, noise, output = draw(5, 3, 4), draw(5, 3, 4, seed=1), draw(5, 3, 4, seed=2)
    noisy, wanted = edm.with_noise(clean, noise, SIGMAS), edm.target(clean, noise, SIGMAS, std)
    torch.testing.assert_close(edm.denoised(wanted, noisy, SIGMAS, std), clean, rtol=0, atol=1e-9)
    error = (edm.denoised(output, noisy, SIGMAS, std) - clean).square()
    weighted = (edm.level_weight(SIGMAS, std)[:, None, None] * error).mean()
    torch.testing.assert_close(edm.denoising_loss(output, clean, noise, SIGMAS, std), weighted, rtol=1e-6, atol=0)


def test_the_target_is_the_velocity_of_diffusion_that_keeps_variance() -> None:
    clean, noise = draw(5, 3, 4), draw(5, 3, 4, seed=1)
    kept = 1 / (1 + SIGMAS.square())
    torch.testing.assert_close(edm.target(clean, noise, SIGMAS), velocity(clean, noise, kept), rtol=0, atol=1e-12)


def test_the_sampler_turns_noise_into_a_gaussian_with_its_ideal_denoiser() -> None:
    mean, std = 0.7, 0.4
    x = 80 * torch.tensor([0.0, 1.0], dtype=torch.float64)
    sigmas = edm.falling_sigmas(256, 0.002, 80.0).tolist()
    for sigma, following in pairwise(sigmas):
        ideal = (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)
        x = edm.euler_step(x, ideal, sigma, following)
    # The map of noise to samples is a line: its value at 0 is the mean, its slope the standard deviation.
    assert x[0].item() == pytest.approx(mean, rel=0.02)
    assert (x[1] - x[0]).item() == pytest.approx(std, rel=0.02)


def test_levels_and_steps_are_those_of_diffusers() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    theirs = schedulers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    theirs.set_timesteps(25)
    sigmas = edm.falling_sigmas(25, 0.002, 700.0)
    torch.testing.assert_close(theirs.sigmas.double(), sigmas, rtol=1e-5, atol=1e-8)
    x = other = sigmas[0] * draw(2, 3, 4)
    for i, time in enumerate(theirs.timesteps):
        sigma_B = sigmas[i].expand(2)
        scale = edm.scales(sigma_B, x)
        assert time.item() == pytest.approx(scale.level_B[0].item(), rel=1e-5, abs=1e-6)
        output = torch.tanh(3 * scale.into * x + scale.level_B[:, None, None])
        read = theirs.scale_model_input(other, time)
        other = theirs.step(torch.tanh(3 * read + scale.level_B[:, None, None]), time, other).prev_sample
        x = edm.euler_step(x, edm.denoised(output, x, sigma_B), float(sigmas[i]), float(sigmas[i + 1]))
        torch.testing.assert_close(x, other.double(), rtol=1e-4, atol=1e-5)


def test_levels_fall_from_the_most_to_the_least_and_end_at_0() -> None:
    for steps in (1, 2, 9):
        sigmas = edm.falling_sigmas(steps, 0.1, 20.0)
        assert len(sigmas) == steps + 1
        assert sigmas[0] == 20
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
        assert steps == 1 or sigmas[-2] == pytest.approx(0.1)


def test_a_step_to_0_is_the_denoised_image() -> None:
    noisy, clean = draw(2, 3), draw(2, 3, seed=1)
    assert torch.equal(edm.euler_step(noisy, clean, 4.0, 0.0), clean)
    torch.testing.assert_close(edm.euler_step(noisy, clean, 4.0, 4.0), noisy)


def test_half_precision_and_no_rows_are_finite() -> None:
    given = [draw(5, 6, seed=seed).bfloat16() for seed in range(3)]
    loss = edm.denoising_loss(*given, SIGMAS.float())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert edm.denoised(given[0], given[1], SIGMAS.float()).dtype == torch.bfloat16
    assert edm.denoising_loss(*(x[:0] for x in given), SIGMAS[:0].float()) == 0


@pytest.mark.parametrize(("name", "given"), [("steps", (0, 0.1, 1.0)), ("least", (3, 2.0, 1.0)), ("most", (3, 0.1, 0))])
def test_levels_that_cannot_be_are_refused(name: str, given: tuple[int, float, float]) -> None:
    with pytest.raises(UserError, match=name):
        edm.falling_sigmas(*given)
