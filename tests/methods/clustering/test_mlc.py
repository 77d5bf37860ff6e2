"""MLC: its two stages, the copied head, the validation by labels, and two ranks."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.vision import MLP
from lightspan.core.distributed import end_process_group, gather_rows
from lightspan.core.errors import UserError
from lightspan.methods.clustering import mlc
from lightspan.methods.clustering.mlc import MLC
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.coding_rate import (
    coding_rate,
    pairwise_coding_rate,
    pairwise_membership,
    total_coding_rate_loss,
)
from lightspan.optim.schedules import Staircase


def method(**settings: Any) -> MLC:
    torch.manual_seed(0)
    parts = {
        "backbone": MLP((1, 4, 4), (12,)),
        "projector": Projector(12, [10], 8),
        "head": torch.nn.Linear(8, 6),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
    }
    built = MLC(**parts | settings)
    built.log_training = lambda figures: built.__dict__.update(logged=figures)  # type: ignore[method-assign]
    return built


def batch(rows: int = 8, views: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(rows, 1, 4, 4, generator=generator) for _ in range(views)]
    return {"views": images, "label": torch.arange(rows) % 3, "index": torch.arange(rows)}


def short(**settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(**quiet, enable_model_summary=False, **settings)


def loader(batches: list[dict[str, Any]]) -> DataLoader:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_the_first_stage_is_the_total_coding_rate_and_leaves_the_cluster_head_alone() -> None:
    model, given = method(), batch()
    z_1, z_2 = (model.represent(torch.cat(given["views"]))[0]).chunk(2)
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, total_coding_rate_loss(z_1, z_2, 0.2, 30.0))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # what DDP waits for
    assert not any(p.grad.any() for p in model.cluster_head.parameters())


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_second_stage_is_the_reduction_of_rates_on_mean_features_and_mean_memberships(views: int) -> None:
    model, given = method(first_share=0.0), batch(views=views)
    with torch.no_grad():
        for parameter in model.cluster_head.parameters():
            parameter.add_(1.0)  # apart from the feature head, so that the copy shows
    model.on_train_batch_start(given, 0)
    loss = model.training_step(given, 0)
    z_VBD = model.represent(torch.cat(given["views"]))[0].view(views, 8, 6)
    membership = torch.stack([pairwise_membership(z, 0.1, 5) for z in z_VBD]).mean(dim=0)
    z_BD = F.normalize(z_VBD.mean(dim=0), dim=1)
    expected = pairwise_coding_rate(z_BD, membership, 0.2) - coding_rate(z_BD, 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert any(p.grad.any() for p in model.cluster_head.parameters())


def test_the_head_is_copied_once_when_the_second_stage_begins() -> None:
    seen = []

    class Watched(MLC):
        def copy_head(self) -> None:
            seen.append(self.global_step)
            super().copy_head()

    torch.manual_seed(0)
    parts = MLP((1, 4, 4), (12,)), Projector(12, [10], 8), torch.nn.Linear(8, 6)
    model = Watched(*parts, first_share=0.5, optimizer=partial(torch.optim.SGD, lr=0.05))
    short(max_steps=5).fit(model, loader([batch() for _ in range(5)]))
    assert seen == [3]
    assert not torch.equal(model.cluster_head.weight, model.head.weight)  # both have trained since


def test_each_stage_has_the_schedule_from_its_beginning_and_a_rate_of_its_own() -> None:
    rates = []

    class Watched(MLC):
        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])  # of the next step

    torch.manual_seed(0)
    parts = MLP((1, 4, 4), (12,)), Projector(12, [10], 8), torch.nn.Linear(8, 6)
    halving = partial(Staircase, at=[0.5], factor=0.5)
    sgd = partial(torch.optim.SGD, lr=0.4)
    for share, expected in ((0.5, [0.4, 0.4, 0.2, 0.04, 0.04, 0.02]), (0.0, [0.4] * 3 + [0.2] * 3)):
        rates.clear()
        model = Watched(*parts, first_share=share, second_rate=0.1, optimizer=sgd, lr_scheduler=halving)
        short(max_steps=6).fit(model, loader([batch() for _ in range(6)]))
        assert rates[:5] == pytest.approx(expected[1:])


def rows_of(count: int = 7) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2))


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    mine = slice(0, 5) if index == 0 else slice(5, 7)
    z, c = rows_of()[mine].requires_grad_(), rows_of().sin()[mine].requires_grad_()
    loss, _ = method().rate_reduction_loss(z[None], c[None])
    loss.backward()
    out = {"loss": loss.detach(), "z": z.grad / 2, "c": c.grad / 2}  # DDP's mean over ranks
    if index == 1:
        mlc.spectral = None  # type: ignore[assignment]  # rank 0 alone clusters
    out["validated"] = validated(torch.arange(7)[mine])
    torch.save(out | {"membership": gather_rows(method().membership(c.detach()))[0]}, Path(folder, f"{index}.pt"))
    end_process_group()


def validated(image_B: torch.Tensor) -> dict[str, float]:
    """What is logged of images in three clusters, whose labels are others."""
    model, logged = method(clusters=3), dict[str, float]()
    model.trainer = SimpleNamespace(sanity_checking=False)  # type: ignore[assignment]
    model.log_dict = lambda figures: logged.update({k: float(v) for k, v in figures.items()})  # type: ignore[method-assign]
    directions = torch.eye(6)[torch.arange(7) % 3]
    model.represent = lambda image: (directions[image],) * 2  # type: ignore[method-assign]
    model.validation_step({"image": image_B, "label": image_B // 3, "index": image_B}, 0)
    model.on_validation_epoch_end()
    return logged


@pytest.mark.ranks
def test_two_ranks_have_the_loss_the_gradient_and_the_membership_of_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    z, c = rows_of().requires_grad_(), rows_of().sin().requires_grad_()
    loss, _ = method().rate_reduction_loss(z[None], c[None])
    loss.backward()
    parts = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2)]
    alone = validated(torch.arange(7))
    assert len(alone) == 3
    assert 0 < alone["val/nmi"] < 1
    for part in parts:
        assert part["validated"] == pytest.approx(alone)
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part["membership"], method().membership(c.detach()))
    for name, whole in (("z", z.grad), ("c", c.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole, rtol=1e-4, atol=1e-5)


def test_validation_tells_clusters_that_are_apart() -> None:
    model = method(clusters=3, temperature=0.05)
    directions = torch.eye(6)[torch.arange(9) % 3]
    model.represent = lambda image: (directions[image.long()],) * 2  # type: ignore[method-assign]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    batches = [{"image": rows, "label": rows % 3, "index": rows} for rows in order.split(4)]
    [logged] = short().validate(model, loader(batches), verbose=False)
    assert logged == pytest.approx({"val/cluster_accuracy": 1, "val/nmi": 1, "val/ari": 1})
    with pytest.raises(UserError, match="clusters=3 compares clusters with labels"):
        model.validation_step({"image": order}, 0)
    short().validate(method(), loader(batches), verbose=False)  # without a number of clusters nothing is measured


@pytest.mark.parametrize("image", [torch.zeros(4, 1, 4, 4), torch.zeros(1, 1, 4, 4)])
def test_equal_images_have_a_finite_loss_and_gradient(image: torch.Tensor) -> None:
    for share in (0.0, 1.0):
        model = method(first_share=share).bfloat16().eval()
        loss = model.training_step({"views": [image.bfloat16()] * 2}, 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_settings_out_of_range_are_refused() -> None:
    for settings, said in (
        ({"distortion": 0.0}, "distortion=0.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"first_share": 1.5}, "first_share=1.5"),
        ({"second_rate": 0.0}, "second_rate=0.0"),
        ({"similarity": -1.0}, "similarity=-1.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"clusters": 1}, "clusters=1"),
        ({"head": torch.nn.Linear(9, 6)}, "head.in_features=9"),
        ({"projector": Projector(9, [16], 6)}, "projector.in_features=9"),
    ):
        with pytest.raises(UserError, match=said):
            method(**settings)
    with pytest.raises(UserError, match="needs 2 views"):
        method().training_step(batch(views=1), 0)
