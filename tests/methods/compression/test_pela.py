from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.adapters.factorise import factorised
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.compression.pela import PELA
from lightspan.methods.supervised.classifier import Classifier
from lightspan.nn.batch_mix import BatchMix

SGD = partial(torch.optim.SGD, lr=0.05)


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=0, embed_dim=32, depth=2, num_heads=2)


def head() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(32, 10)


def method(dtype: torch.dtype = torch.float32, **settings: Any) -> PELA:
    built = PELA(vit().to(dtype), head().to(dtype), optimizer=SGD, **({"ratio": 2.0} | settings))
    built.log_dict = lambda values, **_: built.__dict__.update(logged=values)  # type: ignore[method-assign]
    return built


def images(rows: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(rows, 1, 8, 8, generator=generator).to(dtype), "label": torch.arange(rows) % 10}


def blocks(network: VisionTransformer, image: Tensor) -> list[Tensor]:
    x, found = network._pos_embed(network.patch_embed(image)), []
    for block in network.blocks:
        x = block(x)
        found.append(x)
    return found


def test_the_loss_is_the_papers_sum() -> None:
    model, batch, uncut = method(alpha=0.7, beta=0.2, lam=3.0, eps=0.01), images(), vit().eval()
    student, logits = model.backbone, model(batch["image"])
    expected = F.cross_entropy(logits, batch["label"])
    pairs = list(zip(blocks(student, batch["image"]), blocks(uncut, batch["image"]), strict=True))
    expected = expected + 0.7 * sum((s - t).square().mean() for s, t in pairs) / 2
    expected = expected + 0.2 * (logits - head()(uncut(batch["image"]))).square().mean()
    residuals = [(layer.weight - uncut.get_submodule(name).weight).abs().max() for name, layer in factorised(student)]
    assert len(residuals) == 8
    expected = expected + 3.0 * sum((largest - 0.01) ** 2 for largest in residuals) / 8
    torch.testing.assert_close(model.training_step(batch, 0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "teacher_runs", "terms"),
    [
        ({"alpha": 0.0, "beta": 0.0, "lam": 0.0}, 0, {"task"}),
        ({"alpha": 0.0, "beta": 0.0, "lam": 1.0}, 0, {"task", "perturbation"}),
        ({"alpha": 0.0, "beta": 1.0, "lam": 0.0}, 1, {"task", "logits"}),
        ({"alpha": 1.0, "beta": 0.0, "lam": 0.0}, 1, {"task", "features"}),
    ],
)
def test_a_term_of_weight_zero_costs_nothing(settings: dict[str, float], teacher_runs: int, terms: set[str]) -> None:
    model, batch, calls, products = method(**settings), images(), [], []
    model.teacher.register_forward_hook(lambda *call: calls.append(1))
    perturbation = model.perturbation
    model.perturbation = lambda: products.append(1) or perturbation()  # type: ignore[method-assign, func-returns-value]
    loss = model.training_step(batch, 0)
    assert (len(calls), len(products)) == (teacher_runs, "perturbation" in terms)
    assert model.logged.keys() == {"train/loss"} | {f"train/{term}" for term in terms}
    if terms == {"task"}:
        assert torch.equal(loss, F.cross_entropy(model(batch["image"]), batch["label"]))


def test_the_student_runs_once_a_step() -> None:
    model, calls = method(), []
    model.backbone.register_forward_hook(lambda *call: calls.append(1))
    model.training_step(images(), 0)
    assert calls == [1]


def test_the_teacher_is_the_given_network_and_gets_neither_gradient_nor_training_mode() -> None:
    model = method().train()
    given = nn.Sequential(vit(), head()).state_dict()
    assert all(torch.equal(model.teacher.module.state_dict()[name], value) for name, value in given.items())
    model.training_step(images(), 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = [*model.backbone.parameters(), *model.head.parameters()]
    assert all(parameter.grad is not None for parameter in trained)
    assert not any(module.training for module in model.teacher.modules())


def test_a_given_task_loss_takes_the_place_of_cross_entropy() -> None:
    model, batch = method(task_loss=nn.CrossEntropyLoss(label_smoothing=0.3), alpha=0.0, lam=0.0), images()
    expected = F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=0.3)
    assert torch.equal(model.training_step(batch, 0), expected)


def test_teacher_and_student_see_the_same_mixed_images_and_the_loss_the_shares_of_their_labels() -> None:
    mix = BatchMix(seed=3)
    model, batch, seen = method(mix=mix, lam=0.0), images(), []
    for network in (model.teacher, model.backbone):
        network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    loss = model.training_step(batch, 0)
    mixed, share_BK = mix(batch["image"], batch["label"], 10, 0)
    assert all(torch.equal(image, mixed) for image in seen)
    logits = model(mixed)
    expected = -(share_BK * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(model.logged["train/task"], expected)
    assert loss > model.logged["train/task"]
    model.validation_step(batch, 0)
    torch.testing.assert_close(model.logged["val/loss"], F.cross_entropy(model(batch["image"]), batch["label"]))
    with pytest.raises(UserError, match="PELA mix needs a head with out_features"):
        PELA(vit(), nn.Sequential(head()), mix=mix, optimizer=SGD)


def test_features_are_what_the_head_reads() -> None:
    model, batch = method().eval(), images()
    assert model.features(batch).shape == (6, 32)
    assert torch.equal(model.head(model.features(batch)), model.predict_step(batch, 0))


def test_it_validates_with_the_share_of_right_answers() -> None:
    model, batch = method(), images()
    batch["label"] = model(batch["image"]).argmax(dim=1)
    batch["label"][0] = (batch["label"][0] + 1) % 10
    model.validation_step(batch, 0)
    assert model.logged["val/accuracy"].item() == pytest.approx(5 / 6)


class NoTask(nn.Module):
    def forward(self, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        return 0 * logits_BK.sum()


def test_distillation_alone_brings_the_features_back_to_the_teachers() -> None:
    model, batch = method(alpha=1.0, task_loss=NoTask()), images()
    before = model.training_step(batch, 0).item()
    del model.log_dict  # the Trainer provides the real one
    model.optimizer = partial(torch.optim.Adam, lr=1e-3)
    trainer = Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader([batch] * 12, batch_size=None))
    assert float(trainer.callback_metrics["train/loss"]) < 0.8 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, r"alpha=-1\.0 must"),
        ({"hidden": ["stages"]}, r"VisionTransformer has no container 'stages'; it has blocks"),
        ({"ratio": 0.2}, r"ratio=0\.2 must be at least 1"),
    ],
)
def test_bad_settings_are_refused_before_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


def test_the_recipes_hand_the_network_on_from_one_to_the_next(tmp_path: Path) -> None:
    file, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    uncut = build(resolve("compression/vit")).model
    save_file(uncut.state_dict(), file)
    paths = [f"model.init_args.{part}.init_args.path={file}" for part in ("backbone", "head")]
    svd, pela = (build(resolve(f"compression/{name}", flags=paths)) for name in ("svd", "pela"))
    assert (svd.model.alpha, svd.model.beta, svd.model.lam) == (0, 0, 0)
    assert pela.model.alpha > 0 < pela.model.lam
    assert torch.equal(pela.model.original.blocks[0].attn.qkv.weight, uncut.backbone.blocks[0].attn.qkv.weight)
    assert torch.equal(pela.model.head.weight, uncut.head.weight)
    assert len(list(factorised(pela.model.backbone))) == 16
    pela.datamodule.setup("fit")
    pela.model.log_dict = lambda values, **_: None
    assert pela.model.training_step(next(iter(pela.datamodule.train_dataloader())), 0).isfinite()

    save_file(pela.model.state_dict(), cut)
    tuned = build(resolve("compression/pela_finetune", flags=[f"model.init_args.backbone.init_args.path={cut}"])).model
    assert isinstance(tuned, Classifier)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(tuned.eval().backbone(x), pela.model.eval().backbone(x))
