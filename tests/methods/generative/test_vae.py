"""VAE: its bound by hand and by torch's distributions, what trains, and what is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightspan.backbones.generators import ConvGenerator
from lightspan.backbones.vision import MLP
from lightspan.core.errors import UserError
from lightspan.methods.generative.vae import VAE, divergence


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method(**settings: Any) -> VAE:
    torch.manual_seed(0)
    given = {"backbone": MLP((1, 4, 4), (8,)), "generator": ConvGenerator(3, image_size=4, widths=(6, 4))}
    return VAE(**(given | {"optimizer": partial(torch.optim.Adam, lr=1e-2)} | settings))


def test_the_divergence_is_that_of_torch_and_0_of_normal_numbers_themselves() -> None:
    mean, log_variance = normal(4, 3).double(), normal(4, 3, seed=1).double()
    wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(divergence(mean, log_variance), wanted)
    assert not divergence(torch.zeros(2, 3), torch.zeros(2, 3)).any()
    half = divergence(mean.bfloat16(), log_variance.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_the_loss_is_the_bound_but_for_a_constant(noise: float) -> None:
    model, image, drawn = method(noise=noise), normal(5, 1, 4, 4), normal(5, 3, seed=1)
    mean, log_variance = model.latents(image)
    decoded = model.generator(mean + log_variance.exp().sqrt() * drawn)
    constant = Normal(0.0, noise).log_prob(torch.tensor(0.0)) * 16
    nats = -Normal(decoded, noise).log_prob(image).flatten(1).sum(dim=1) + constant
    losses = model.losses(image, drawn)
    torch.testing.assert_close(losses["pixels"], nats.mean())
    torch.testing.assert_close(losses["divergence"], divergence(mean, log_variance).mean())


def test_it_learns_images_and_its_means_draw_them_again(tmp_path: Path) -> None:
    model, image = method(noise=0.1), normal(4, 1, 4, 4)
    batch = {"image": image, "label": torch.zeros(4, dtype=torch.int64), "index": torch.arange(4)}
    before = (model.generator(model.latents(image)[0]) - image).square().mean()
    fit(model, [batch] * 150, tmp_path)
    assert (model.generator(model.latents(image)[0]) - image).square().mean() < 0.2 * before
    assert model.features(batch).shape == (4, 8)


def test_no_images_give_a_finite_gradient() -> None:
    losses = method().losses(normal(0, 1, 4, 4), normal(0, 3))
    assert all(value == 0 for value in losses.values())


def test_images_of_other_sides_are_refused() -> None:
    model = method(backbone=MLP((1, 8, 8), (8,)))
    with pytest.raises(UserError, match="image_size"):
        model.losses(normal(2, 1, 8, 8), normal(2, 3))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"noise": 0.0}, "noise"),
        ({"generator": nn.Linear(3, 4)}, "generator"),
        ({"backbone": nn.Flatten()}, "backbone"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        method(**settings)
