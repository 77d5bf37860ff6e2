"""Hydra: the loss of its parts, gradients where they belong, two ranks that train as one."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import Trainer
from torch import Tensor

from lightspan.backbones.vision import SmallConvNet
from lightspan.callbacks.watching.online_probes import OnlineProbes
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Plain
from lightspan.datamodules.image.sets.coloured_shapes import ColouredShapes
from lightspan.methods.contrastive.hydra import Hydra
from lightspan.nn.class_pairs import Arbitrary, ClassPairs, Identical
from lightspan.nn.heads.class_gates import ClassPairGate
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.info_nce import class_pair_loss

SGD = partial(torch.optim.SGD, lr=0.05)
GATED: dict[str, Any] = {"pairs": Arbitrary(1)}
IDENTICAL: dict[str, Any] = {"pairs": Identical(), "gate": None}


def method(**settings: Any) -> Hydra:
    torch.manual_seed(0)
    parts = {
        "backbone": SmallConvNet(in_chans=3, width=4, stages=2),
        "projector": Projector(8, [16], 6, layer_norm=True),
        "gate": ClassPairGate(64, 6, label_features=5, hidden=7),
    }
    built = Hydra(**parts | settings, optimizer=SGD)
    built.log_training = lambda figures: built.__dict__.update(logged=figures)  # type: ignore[method-assign]
    return built


def batch(rows: int = 8, views: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, views, 3, 8, 8, generator=generator)
    label = torch.randint(5, (rows,), generator=generator)
    return {"views": [*images.unbind(1)], "label": label, "index": torch.arange(rows)}


def test_the_loss_is_that_of_its_parts_on_all_views_of_all_images() -> None:
    model, reference, given = method(**GATED), method(**GATED), batch()
    loss = model.training_step(given, 4)
    label = given["label"].repeat_interleave(2)
    partner = Arbitrary(1).partners(label, 0, 4)
    z = reference.projector(reference.backbone(torch.stack(given["views"], dim=1).flatten(0, 1)))
    expected = class_pair_loss(z, label, partner, reference.gate(label, partner), 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(z[2 * 3 + 1], z.view(8, 2, 6)[3, 1])  # an image's views stand together
    assert model.logged["train/anchors_with_positives"] == 1
    assert 0 < model.logged["train/gate_spread"] < 0.5


def test_identical_pairs_without_a_gate_need_no_draw_and_log_no_gate() -> None:
    model, given = method(**IDENTICAL), batch()
    state = torch.get_rng_state()
    losses = [model.eval().training_step(given, step) for step in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(torch.get_rng_state(), state)
    assert "train/gate_mean" not in model.logged


def test_each_step_draws_pairs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given, losses = batch(), list[Tensor]()
    for step in (0, 1, 1):
        model = method(**GATED)
        monkeypatch.setattr(type(model), "global_step", step)
        losses.append(model.training_step(given, 0).detach())
    assert not torch.equal(losses[0], losses[1])
    assert torch.equal(losses[1], losses[2])


def test_all_parts_are_trained_and_batches_of_images_work_too() -> None:
    model = method(**GATED)
    images = batch(views=1)
    model.training_step({"image": images["views"][0], "label": images["label"]}, 0).backward()
    for part in (model.backbone, model.projector, model.gate):
        # A bias before a BatchNorm has no say.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert any(p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("settings", [GATED, IDENTICAL], ids=["hydra", "identical pairs"])
def test_a_batch_of_one_class_has_no_negatives_and_moves_nothing(settings: dict[str, Any]) -> None:
    model, given = method(**settings), batch()
    given["label"] = torch.full_like(given["label"], 3)
    loss = model.training_step(given, 0)
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_autocast_to_bfloat16_gives_a_finite_loss_near_that_of_float32() -> None:
    loss = method(**GATED).training_step(batch(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(**GATED).training_step(batch(), 0)
    half.backward()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=0.05, atol=0)


def test_a_probe_of_the_features_changes_no_weight_of_the_run() -> None:
    def train(*callbacks: OnlineProbes) -> dict[str, Tensor]:
        model = method(**GATED)
        del model.log_training
        trainer = Trainer(
            max_steps=2,
            accelerator="cpu",
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(model, datamodule=ColouredShapes(batch_size=128, views=Plain(), size=256))
        assert ("probe/linear_accuracy" in trainer.callback_metrics) == bool(callbacks)
        return model.state_dict()

    with_probe, without = train(OnlineProbes()), train()
    assert all(torch.equal(with_probe[name], without[name]) for name in without)


class PairsOfPlace(ClassPairs):
    """The class of the row three places on: a partner that shows the order of the rows of all ranks."""

    def draw(self, label_N: Tensor, generator: Any) -> Tensor:
        return label_N.roll(3)


def of_all_rows(pairs: ClassPairs, rows: slice) -> tuple[Hydra, Tensor]:
    """The model in float64 after a backward pass. BatchNorm's statistics are fixed: gloo has no synchronised ones."""
    model, given = method(pairs=pairs).double().eval(), batch()
    part = {"views": [view[rows].double() for view in given["views"]], "label": given["label"][rows]}
    loss = model.training_step(part, 2)
    loss.backward()
    return model, loss.detach()


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    out = {}
    for pairs in (Arbitrary(1), PairsOfPlace()):
        model, loss = of_all_rows(pairs, (slice(0, 5), slice(5, 8))[index])
        out[type(pairs).__name__] = loss
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            out[f"{type(pairs).__name__} {name}"] = gradient / 2  # DDP's mean
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_have_the_pairs_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2))
    for pairs in (Arbitrary(1), PairsOfPlace()):
        model, loss = of_all_rows(pairs, slice(0, 8))
        kind = type(pairs).__name__
        for out in (first, second):
            torch.testing.assert_close(out[kind], loss, rtol=1e-12, atol=0)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(out[f"{kind} {name}"], parameter.grad, rtol=1e-9, atol=1e-13)


def test_parts_that_do_not_fit_are_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"projector.in_features=9, but SmallConvNet gives 8 features; set it to 8"):
        method(**GATED, projector=Projector(9, [16], 6))
    with pytest.raises(UserError, match=r"gate.out_features=5, but Projector gives 6 features; set it to 6"):
        method(**GATED, gate=ClassPairGate(64, 5))
    with pytest.raises(UserError, match=r"temperature=0.0 must be above 0"):
        method(**GATED, temperature=0.0)


def test_batches_without_labels_or_with_views_of_several_sizes_are_refused() -> None:
    model, given = method(**GATED), batch()
    with pytest.raises(UserError, match=r"Hydra needs views of one size, and this batch has .*\[3, 4, 4\]"):
        model.training_step(given | {"views": [given["views"][0], given["views"][1][..., :4, :4]]}, 0)
    with pytest.raises(
        UserError, match=r"Hydra needs a whole number for each sample as label, and this batch holds views"
    ):
        model.training_step({"views": given["views"]}, 0)


def test_features_come_from_before_the_projector() -> None:
    model, given = method(**GATED).eval(), batch()
    image = given["views"][0]
    assert torch.equal(model.features(given), model.backbone(image))
    assert torch.equal(model.features({"image": image}), model.backbone(image))


def test_the_recipe_of_identical_pairs_differs_in_pairs_and_gate_alone() -> None:
    names = "hydra", "identical_pairs"
    hydra, identical = (resolve(f"contrastive/{name}").config["model"]["init_args"] for name in names)
    assert {name for name in hydra if hydra[name] != identical[name]} == {"pairs", "gate"}
    built = build(resolve("contrastive/identical_pairs")).model
    assert isinstance(built, Hydra)
    assert built.gate is None
    assert isinstance(built.pairs, Identical)
