from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.generators import ConvGenerator
from lightspan.core.errors import UserError
from lightspan.methods.generative.hda import HDA, hull_losses
from lightspan.subspaces.affine import affine_hull

SGD = partial(torch.optim.SGD, lr=0.1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Seen(nn.Module):
    """Eight numbers of an image, and what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image.flatten(1))


def method(**settings: Any) -> HDA:
    torch.manual_seed(0)
    given = {"generator": ConvGenerator(3, image_size=4, widths=(6, 4)), "encoders": [Seen()], "num_classes": 2}
    return HDA(**(given | {"optimizer": SGD} | settings))


def other_generator() -> ConvGenerator:
    torch.manual_seed(5)
    return ConvGenerator(3, image_size=4, widths=(6, 4))


def shots(*domains: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(len(domains), 1, 4, 4, seed=seed).float(), torch.tensor(domains, dtype=torch.int64)


def test_the_losses_are_those_of_least_squares_and_of_angles() -> None:
    e_ZD, source_ZD, points, blend = (
        normal(3, 7),
        normal(3, 7, seed=1),
        [normal(2, 7, seed=2), normal(4, 7, seed=3)],
        [1.0, 0.5],
    )
    distance = direction = 0.0
    for points_ND, weight in zip(points, blend, strict=True):
        for e, source in zip(e_ZD.numpy(), source_ZD.numpy(), strict=True):
            first, differences = points_ND[0].numpy(), (points_ND[1:] - points_ND[0]).T.numpy()
            nearest = [
                first + differences @ np.linalg.lstsq(differences, of - first, rcond=None)[0] for of in (e, source)
            ]
            moved, wanted = e - source, nearest[1] - source
            distance += weight * float(np.linalg.norm(e - nearest[0])) / 3
            cosine = float(moved @ wanted / np.linalg.norm(moved) / np.linalg.norm(wanted))
            direction += weight * (1 - cosine) / 3
    losses = hull_losses(e_ZD, source_ZD, [affine_hull(of) for of in points], blend)
    assert losses["distance"].item() == pytest.approx(distance, abs=1e-10)
    assert losses["direction"].item() == pytest.approx(direction, abs=1e-10)


@pytest.mark.parametrize("count", [1, 4])  # shots; one is a point
def test_a_step_along_the_perpendicular_shortens_the_distance_and_keeps_the_direction(count: int) -> None:
    hull, source_ZD = affine_hull(normal(count, 9)), normal(3, 9, seed=1)
    start = hull.residual(source_ZD).norm(dim=1).mean()
    for share in (0.1, 0.7):
        losses = hull_losses(source_ZD - share * hull.residual(source_ZD), source_ZD, [hull], [1.0])
        torch.testing.assert_close(losses["distance"], (1 - share) * start, rtol=0, atol=1e-12)
        assert abs(losses["direction"].item()) < 1e-12


def test_the_direction_does_not_depend_on_how_far_features_moved() -> None:
    hull, source_ZD, moved_ZD = affine_hull(normal(4, 9)), normal(3, 9, seed=1), normal(3, 9, seed=2)
    near, far = (hull_losses(source_ZD + by * moved_ZD, source_ZD, [hull], [1.0])["direction"] for by in (0.01, 5.0))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-12)


def test_features_that_have_not_moved_or_lie_in_the_hull_have_a_finite_gradient() -> None:
    points_ND = normal(4, 9)
    hull = affine_hull(points_ND)
    for source_ZD in (normal(3, 9, seed=1), points_ND[:3]):
        e_ZD = source_ZD.clone().requires_grad_()
        losses = hull_losses(e_ZD, source_ZD, [hull], [1.0])
        (gradient,) = torch.autograd.grad(losses["direction"], e_ZD, retain_graph=True)
        assert losses["direction"].item() == 1
        assert not gradient.any()
        assert torch.autograd.grad(losses["distance"], e_ZD)[0].isfinite().all()


def test_the_gradient_is_that_of_differences() -> None:
    hulls, source_ZD = [affine_hull(normal(3, 6, seed=s)) for s in (1, 2)], normal(2, 6, seed=3)
    total = lambda e_ZD: sum(hull_losses(e_ZD, source_ZD, hulls, [1.0, 2.0]).values())  # noqa: E731
    assert torch.autograd.gradcheck(total, normal(2, 6).requires_grad_())


def test_features_of_any_length_pull_alike_and_the_direction_has_its_weight() -> None:
    model, z_ZL, (image, domain) = method(direction=3.0), normal(5, 3, seed=4).float(), shots(0, 0, 1, 0, 1)
    model.generator.load_state_dict(method(generator=other_generator()).generator.state_dict())
    losses = model.losses(z_ZL, image, domain)
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            parameter *= 10
    torch.testing.assert_close(model.losses(z_ZL, image, domain), losses, rtol=1e-4, atol=1e-4)
    assert losses["distance"] < 2 * 2  # a feature of length 1 and a point of a hull are no farther apart than that
    model.losses = lambda *_: losses  # type: ignore[method-assign]
    model.log_training = lambda *_, **__: None  # type: ignore[method-assign]
    found = model.training_step({"image": image, "label": domain}, 0)  # type: ignore[typeddict-item]
    torch.testing.assert_close(found, losses["distance"] + 3 * losses["direction"])


def test_neither_order_nor_repeated_shots_matter_and_an_absent_domain_pulls_at_nothing() -> None:
    model, z_ZL, (image, domain) = method(), normal(5, 3, seed=4).float(), shots(0, 0, 1, 0, 1)
    losses, order = model.losses(z_ZL, image, domain), [4, 3, 3, 0, 2, 1, 1]
    again = model.losses(z_ZL, image[order], domain[order])
    torch.testing.assert_close(again, losses, rtol=0, atol=1e-5)
    alone = [model.losses(z_ZL, image[domain == k], domain[domain == k])["distance"] for k in (0, 1)]
    torch.testing.assert_close(sum(alone), losses["distance"], rtol=0, atol=1e-5)


def test_a_domain_with_blend_0_pulls_at_nothing() -> None:
    z_ZL, (image, domain) = normal(5, 3, seed=4).float(), shots(0, 0, 1, 0, 1)
    one = method(blend=[0.0, 2.0]).losses(z_ZL, image, domain)
    both = method().losses(z_ZL, image[domain == 1], domain[domain == 1])
    torch.testing.assert_close(one["distance"], 2 * both["distance"])


def trained(model: HDA, steps: int) -> list[float]:
    """Distances on the same latents before and after Adam's steps."""
    image, domain = shots(*[0, 1] * 6)  # two hulls of 5 directions among 8 meet; those of fewer need not
    z_ZL, optimizer = normal(32, 3, seed=9).float(), torch.optim.Adam(model.generator.parameters(), lr=1e-2)
    model.log_training = lambda *_, **__: None  # type: ignore[method-assign]
    distances = [model.losses(z_ZL, image, domain)["distance"].item()]
    for step in range(steps):
        optimizer.zero_grad()
        model.training_step({"image": image, "label": domain}, step).backward()  # type: ignore[typeddict-item]
        optimizer.step()
    return [*distances, model.losses(z_ZL, image, domain)["distance"].item()]


def test_the_generator_comes_near_both_hulls_while_its_source_and_the_encoder_stay() -> None:
    model = method(latents=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start, end = trained(model, 150)
    assert end < 0.5 * start
    after = model.state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"generator"}
    assert not [
        name for name, weight in model.named_parameters() if weight.grad is not None and "generator" not in name
    ]


def test_at_the_start_the_generator_is_its_source() -> None:
    model, z_ZL = method(), normal(5, 3).float()
    assert torch.equal(model.generator(z_ZL), model.source(z_ZL))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"latents": 0}, "latents"),
        ({"direction": -1.0}, "direction"),
        ({"blend": [1.0]}, "blend"),
        ({"blend": [1.0, -1.0]}, "blend"),
        ({"encoders": []}, "encoders"),
        ({"generator": nn.Linear(3, 4)}, "generator"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        method(**settings)
