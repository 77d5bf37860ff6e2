from functools import partial
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.mixed_barlow_twins import MixedBarlowTwins
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.barlow import barlow_twins_loss, mixed_regulariser, standardise

SGD = partial(torch.optim.SGD, lr=0.05)


def method(**settings: Any) -> MixedBarlowTwins:
    torch.manual_seed(0)
    built = MixedBarlowTwins(
        SmallConvNet(width=4, stages=2),
        Projector(8, [16], 32),
        optimizer=SGD,
        **({"lam": 0.02, "lam_reg": 2.0} | settings),
    )
    built.log_dict = lambda values: built.__dict__.update(logged=values)  # type: ignore[method-assign]
    return built


def views(rows: int = 10) -> dict[str, Any]:
    x = torch.randn(2, rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"views": list(x), "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows)}


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def test_loss_is_the_papers_sum_for_the_mixture_that_was_drawn() -> None:
    model, batch = method(), views()
    torch.manual_seed(7)
    loss = model.training_step(batch, 0)

    reference = method()
    torch.manual_seed(7)
    mix, p = torch.distributions.Beta(1.0, 1.0).sample(), torch.randperm(10)
    x1, x2 = batch["views"]
    z1, z2, zm = (standardise(reference.embed(x)) for x in (x1, x2, mix * x1 + (1 - mix) * x2[p]))
    expected = barlow_twins_loss(z1, z2, 0.02) + 2.0 * 0.02 * mixed_regulariser(zm, z1, z2, mix, p)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_without_the_mixed_term_loss_and_gradients_are_barlow_twins_exactly_and_nothing_is_drawn() -> None:
    model, reference, batch = method(lam_reg=0.0), method(lam_reg=0.0), views()
    state = torch.get_rng_state()
    loss = model.training_step(batch, 0)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    expected = barlow_twins_loss(*(standardise(reference.embed(x)) for x in batch["views"]), 0.02)
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(reference), strict=True))
    assert len(gradients(model)) == len(list(model.parameters()))


def test_the_same_generator_state_gives_the_same_step() -> None:
    losses = []
    for _ in range(2):
        model = method()
        torch.manual_seed(3)
        losses.append(model.training_step(views(), 0))
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], method().training_step(views(), 0))


def test_the_mixture_is_drawn_where_half_precision_is_the_default() -> None:
    model, given = method().bfloat16(), [view.bfloat16() for view in views()["views"]]
    torch.set_default_dtype(torch.bfloat16)  # as trainer.precision=bf16-true does
    try:
        assert model.training_step({"views": given}, 0).isfinite()
    finally:
        torch.set_default_dtype(torch.float32)


def test_normalize_makes_the_loss_blind_to_the_length_of_each_embedding() -> None:
    batch = views()
    model = method(lam_reg=0.0, normalize=True).eval()
    before = model.training_step(batch, 0)
    inner = model.projector
    model.projector = nn.Sequential(inner, PerRowScale())
    torch.testing.assert_close(model.training_step(batch, 0), before, rtol=1e-5, atol=0)
    model.normalize = False
    assert not torch.allclose(model.training_step(batch, 0), before, rtol=1e-2)


class PerRowScale(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD * torch.linspace(0.1, 3, len(x_BD))[:, None]


def test_embedding_spread_is_zero_when_all_images_share_one_embedding() -> None:
    model = method()
    model.training_step(views(), 0)
    spread = model.logged["train/embedding_spread"]
    assert 0.1 < spread < 1
    same = views()
    same["views"] = [x[:1].expand(10, -1, -1, -1) for x in same["views"]]
    loss = model.training_step(same, 0)
    loss.backward()
    assert model.logged["train/embedding_spread"] < 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients(model))


def test_features_come_from_before_the_projector_for_views_and_for_images() -> None:
    model, batch = method().eval(), views()
    image = batch["views"][0]
    assert torch.equal(model.features(batch), model.backbone(image))
    assert torch.equal(model.features({"image": image}), model.backbone(image))


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(float(args[2]["loss"]))


def test_training_lowers_the_loss_and_repeats_bit_for_bit() -> None:
    def train() -> tuple[MixedBarlowTwins, list[float]]:
        model, losses = method(), Losses()
        del model.log_dict  # the Trainer provides the real one
        torch.manual_seed(5)
        trainer = Trainer(
            max_steps=16,
            accelerator="cpu",
            callbacks=[losses],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader([views()] * 16, batch_size=None))
        return model, losses.seen

    (first, losses), (second, again) = train(), train()
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert losses == again
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_projector_of_another_width_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"in_features=9, but SmallConvNet gives 8 features; set it to 8"):
        MixedBarlowTwins(SmallConvNet(width=4, stages=2), Projector(9, [16], 32), optimizer=SGD)


@pytest.mark.parametrize("bad", [{"lam": -0.1}, {"lam_reg": -1.0}, {"alpha": 0.0}])
def test_weights_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"(lam|lam_reg|alpha)=\S+ must"):
        method(**bad)


@pytest.mark.parametrize(("name", "lam_reg"), [("mixed_barlow_twins", 4.0), ("barlow_twins", 0.0)])
def test_the_recipe_builds_and_its_baseline_differs_in_the_mixed_term_alone(name: str, lam_reg: float) -> None:
    built = build(resolve(f"contrastive/{name}"))
    assert isinstance(built.model, MixedBarlowTwins)
    assert (built.model.lam, built.model.lam_reg, built.model.normalize) == (1 / 128, lam_reg, True)
    built.datamodule.setup("fit")
    batch = next(iter(built.datamodule.train_dataloader()))
    built.model.log_dict = lambda values: None  # type: ignore[method-assign]
    assert built.model.training_step(batch, 0).isfinite()
    assert built.model.features(batch).shape == (len(batch["label"]), built.model.backbone.num_features)
