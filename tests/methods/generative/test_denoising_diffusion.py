from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.diffusion import DiT
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.generative.denoising_diffusion import DenoisingDiffusion
from lightspan.objectives.diffusion import add_noise, linear_kept, noise_of_velocity, variance_loss, velocity

ADAM = partial(torch.optim.Adam, lr=3e-3)


class Spy(nn.Module):
    """Predicts zero and remembers what it was asked."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, noisy: Tensor, level: Tensor, label: Tensor) -> Tensor:
        self.asked.append((noisy, level, label))
        return noisy * self.weight


class Knows(nn.Module):
    """The exact predictor of a world with one image."""

    num_classes = 0

    def __init__(self, image: Tensor, kept_T: Tensor, prediction: str) -> None:
        super().__init__()
        self.image, self.kept_T, self.prediction = image, kept_T, prediction

    def forward(self, noisy: Tensor, level: Tensor, label: Tensor | None) -> Tensor:
        assert label is None
        kept = self.kept_T[level]
        noise = (noisy - kept.sqrt().view(-1, 1, 1, 1) * self.image) / (1 - kept).sqrt().view(-1, 1, 1, 1)
        return noise if self.prediction == "noise" else velocity(self.image, noise, kept)


def method(backbone: nn.Module, **settings: Any) -> DenoisingDiffusion:
    built = DenoisingDiffusion(backbone, optimizer=ADAM, **settings)
    built.log = lambda name, value, **_: built.__dict__.setdefault("logged", {}).update({name: value})  # type: ignore[method-assign]
    return built


def images(rows: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(rows, 1, 4, 4, generator=generator), "label": torch.arange(rows) % 10}


def test_the_loss_of_a_network_that_says_nothing_is_the_variance_of_the_noise() -> None:
    spy = Spy()
    torch.manual_seed(0)
    loss = method(spy).training_step(images(512), 0)
    assert loss.item() == pytest.approx(1, abs=0.05)
    ((noisy, level, label),) = spy.asked
    assert noisy.shape == (512, 1, 4, 4)
    assert 0 <= level.min() < 50
    assert 950 < level.max() < 1000
    assert ((label == 10).float().mean() - 0.1).abs() < 0.05
    assert torch.equal(label[label < 10], images(512)["label"][label < 10])


def test_what_the_network_sees_is_the_noised_image() -> None:
    spy, batch = Spy(), images(8)
    model = method(spy)
    level, noise = torch.arange(8) * 100, torch.randn(8, 1, 4, 4)
    model.loss(batch, level, noise, torch.ones(8, dtype=torch.bool))
    expected = add_noise(batch["image"], noise, linear_kept(1000).float()[level])
    assert torch.equal(spy.asked[0][0], expected)


@pytest.mark.parametrize(("dropout", "told"), [(0.0, True), (1.0, False)])
def test_classes_are_told_or_withheld(dropout: float, told: bool) -> None:
    spy = Spy()
    method(spy, label_dropout=dropout).training_step(images(), 0)
    assert torch.equal(spy.asked[0][2], images()["label"] if told else torch.full((64,), 10))


def test_the_same_generator_state_gives_the_same_step() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(method(Spy()).training_step(images(), 0))
    assert torch.equal(*losses)


def test_held_out_loss_repeats_and_visits_ten_levels_evenly() -> None:
    spy = Spy()
    model = method(spy)
    model.validation_step(images(), 0)
    first = model.logged["val/loss"]
    assert [int(level[0]) for _, level, _ in spy.asked] == [50, 150, 250, 350, 450, 549, 649, 749, 849, 949]
    torch.randn(5)
    assert torch.equal(model.held_out_loss(images(), 0), first)
    assert not torch.equal(model.held_out_loss(images(), 1), first)


@pytest.mark.sample(6)
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_perfect_network_loses_nothing_and_draws_the_one_image_there_is(
    prediction: Any, schedule: Any, eta: float, steps: int
) -> None:
    image = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    model = method(nn.Identity(), schedule=schedule, prediction=prediction).double()
    model.backbone = Knows(image, model.kept_T, prediction)
    batch = {"image": image, "label": torch.zeros(1, dtype=torch.int64)}
    assert model.held_out_loss(batch, 0).item() == pytest.approx(0, abs=1e-6)
    drawn = model.sample(torch.zeros(3, dtype=torch.int64), (1, 4, 4), steps=steps, eta=eta)
    torch.testing.assert_close(drawn, image.expand(3, -1, -1, -1).float(), rtol=0, atol=2e-3, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_table_of_levels_keeps_its_precision_whatever_the_module_is_cast_to(dtype: torch.dtype) -> None:
    model = method(Spy())
    expected = model.kept_T.clone()
    for moved in (model.to(dtype), nn.ModuleDict({"inside": model}).to(dtype)):
        assert next(moved.parameters()).dtype == dtype
        assert torch.equal(model.kept_T, expected)
    assert model.to("meta").kept_T.is_meta


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_in_true_bfloat16_it_trains_and_draws_nearly_as_in_float32(prediction: Any) -> None:
    labels, drawn = torch.arange(6), {}
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        backbone = DiT(4, 2, width=16, depth=1, heads=2, num_classes=10)
        for part in (backbone.head, backbone.modulation):
            nn.init.normal_(part.weight, std=0.1)
        model = DenoisingDiffusion(backbone, optimizer=partial(torch.optim.SGD, lr=1e-2), prediction=prediction)
        trainer = Trainer(
            max_steps=2, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1,
        )  # fmt: skip
        trainer.fit(model, DataLoader([images()] * 2, batch_size=None), DataLoader([images()], batch_size=None))
        assert next(model.parameters()).dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
        assert all(p.isfinite().all() for p in model.parameters())
        drawn[precision] = model.sample(labels, (1, 4, 4), steps=5, eta=1.0, guidance=1.5)
        assert drawn[precision].dtype == torch.float32
    apart = (drawn["32-true"] - drawn["bf16-true"]).norm() / drawn["32-true"].norm()
    assert 0 < apart < 0.05  # bfloat16 has three digits, and the last level divides by sqrt(kept)


def test_drawing_with_every_step_visits_every_level_once() -> None:
    assert method(Spy()).spread(1000) == list(range(1000))


def test_drawing_is_a_function_of_seed_and_class() -> None:
    torch.manual_seed(0)
    model = method(DiT(4, 2, width=16, depth=1, heads=2, num_classes=10))
    nn.init.normal_(model.backbone.head.weight, std=0.3)
    nn.init.normal_(model.backbone.modulation.weight, std=0.3)
    draw = partial(model.sample, shape=(1, 4, 4), steps=4)
    labels = torch.tensor([1, 2])
    assert torch.equal(draw(labels), draw(labels))
    assert not torch.equal(draw(labels), draw(labels, seed=1))
    assert not torch.equal(draw(labels), draw(labels.flip(0)))
    assert not torch.equal(draw(labels), draw(labels, guidance=2.0))
    nobody = torch.full_like(labels, 10)
    torch.testing.assert_close(draw(labels, guidance=0.0), draw(nobody), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_drawn_images_lie_in_the_range_they_are_clipped_to(eta: float) -> None:
    torch.manual_seed(0)
    model = method(DiT(4, 2, width=16, depth=1, heads=2, num_classes=10))
    nn.init.normal_(model.backbone.head.weight, std=0.3)
    draw = partial(model.sample, torch.arange(10), (1, 4, 4), steps=5, eta=eta, guidance=2.0)
    least, greatest = torch.tensor([[[-0.5]]]), torch.tensor([[[0.75]]])
    free, clipped = draw(), draw(clip=(least, greatest))
    assert free.min() < least
    assert free.max() > greatest
    assert clipped.min() == least
    assert clipped.max() == greatest
    assert torch.equal(draw(clip=(-torch.inf * greatest, torch.inf * greatest)), free)


def learned(**settings: Any) -> DenoisingDiffusion:
    torch.manual_seed(0)
    backbone = DiT(4, 2, width=16, depth=1, heads=2, num_classes=10, learned_variance=True)
    for part in (backbone.head, backbone.modulation):
        nn.init.normal_(part.weight, std=0.3)
    return method(backbone, **settings)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_a_learned_variance_adds_its_term_and_leaves_the_prediction_its_gradient(prediction: Any) -> None:
    model, batch = learned(prediction=prediction), images(6)
    level, noise = torch.tensor([0, 1, 200, 500, 800, 999]), torch.randn(6, 1, 4, 4)
    rest = level, noise, torch.ones(6, dtype=torch.bool)
    kept = model.kept_T[level]
    noisy = add_noise(batch["image"], noise, kept)
    said, share = model.predict(noisy, level, batch["label"])
    assert share is not None
    implied = noise_of_velocity(said, noisy, kept) if prediction == "velocity" else said
    bits = variance_loss(implied, share, noise, batch["image"], kept, model.ends_2T[:, level], level == 0)
    target = velocity(batch["image"], noise, kept) if prediction == "velocity" else noise
    loss = model.loss(batch, *rest)
    assert loss.item() == pytest.approx((said - target).square().mean().item() + bits.item(), rel=1e-6)
    # The rows of the head that predict learn as they would from the squared error alone.
    of_both, of_error = (
        torch.autograd.grad(one, model.backbone.head.weight)[0] for one in (loss, (said - target).square().mean())
    )
    torch.testing.assert_close(of_both[:4], of_error[:4])
    assert of_both[4:].all()
    assert not of_error[4:].any()


def test_a_learned_variance_draws_with_it_and_with_eta_0_does_not_need_it() -> None:
    model, labels = learned(), torch.arange(3)
    draw = partial(model.sample, labels, (1, 4, 4), steps=5, guidance=1.5)
    before = [draw(eta=eta) for eta in (0.0, 1.0)]
    assert all(one.shape == (3, 1, 4, 4) for one in before)
    with torch.no_grad():
        model.backbone.head.bias[4:] += 1
    after = [draw(eta=eta) for eta in (0.0, 1.0)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_without_classes_no_label_is_asked_for_and_validation_hides_it_too() -> None:
    spy = Spy()
    model = method(spy, label_dropout=1.0)
    unlabelled = {"image": images(4)["image"]}
    model.training_step(unlabelled, 0)
    model.held_out_loss(unlabelled, 0)
    assert all((label == 10).all() for _, _, label in spy.asked)


def test_training_lowers_the_held_out_loss() -> None:
    torch.manual_seed(0)
    pattern = torch.sign(torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(5)))
    batch = {"image": pattern.expand(32, -1, -1, -1), "label": torch.zeros(32, dtype=torch.int64)}
    model = method(DiT(4, 2, width=16, depth=1, heads=2, num_classes=10))
    before = model.held_out_loss(batch, 0).item()
    del model.log  # the Trainer provides the real one
    trainer = Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader([batch] * 40, batch_size=None))
    assert model.held_out_loss(batch, 0).item() < 0.8 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 1}, r"levels=1 must be at least 2"),
        ({"label_dropout": 1.5}, r"label_dropout=1\.5 must"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(Spy(), **settings)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 1001}, {"eta": -0.1}, {"eta": 1.1}])
def test_steps_and_eta_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"steps=\d+ must be in \[1, 1000\] and eta=.* in \[0, 1\]"):
        method(Spy()).sample(torch.zeros(1, dtype=torch.int64), (1, 4, 4), **bad)


def test_the_recipe_of_diffscaler_trains_a_bank_on_the_pretrained_network_alone(tmp_path: Path) -> None:
    pretrained = build(resolve("generative/diffusion")).model
    save_file(pretrained.state_dict(), tmp_path / "model.safetensors")
    flags = [f"model.init_args.backbone.init_args.path={tmp_path / 'model.safetensors'}"]
    whole, bank = (build(resolve(f"generative/{name}", flags=flags)) for name in ("diffusion_finetune", "diffscaler"))
    numbers = sum(p.numel() for p in pretrained.parameters())
    assert sum(p.numel() for p in whole.model.parameters() if p.requires_grad) == numbers
    for callback in bank.trainer.callbacks:
        if isinstance(callback, Adaptation):
            callback.adapt(bank.model)
    trained = {name: p for name, p in bank.model.named_parameters() if p.requires_grad}
    assert all(".adapters.default." in name for name in trained)
    assert 0.05 < sum(p.numel() for p in trained.values()) / numbers < 0.15
    bank.datamodule.setup("fit")
    batch = next(iter(bank.datamodule.train_dataloader()))
    assert set(batch["label"].tolist()) == {5, 6, 7, 8, 9}
    assert torch.equal(bank.model.held_out_loss(batch, 0), whole.model.held_out_loss(batch, 0))
