"""ADSL: plain margin loss before a split, what a split does to optimiser, clusters and batches, and when one comes."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import rank_processes
import torch
from lightning import Callback, LightningDataModule, Trainer
from method_runs import differences, fit, in_float64, in_halves
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.attended import Attended
from lightspan.backbones.vision import SmallConvNet
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.shapes import Shapes
from lightspan.methods.supervised.adsl import ADSL
from lightspan.nn.heads.subspace_learners import SubspaceLearners
from lightspan.objectives.margin import margin_loss

ADAM = partial(torch.optim.Adam, lr=0.01)
SOON: dict[str, Any] = {"patience": 1, "least_width": 2, "least_kept": 1, "tune_from": 1.0}
"""Without validation the first split comes before the epoch numbered 1."""


def batch(seed: int = 0, rows: int = 12) -> dict[str, Tensor]:
    generator, label = torch.Generator().manual_seed(seed), (torch.arange(rows) + seed) % 3
    image = torch.randn(rows, 1, 8, 8, generator=generator)
    return {"image": image, "label": label, "index": torch.arange(rows) + rows * seed}


BATCHES = [batch(seed) for seed in range(3)]


def method(**settings: Any) -> ADSL:
    torch.manual_seed(0)
    given = {"images": 36, "num_classes": 3, "optimizer": ADAM}
    return ADSL(method_runs.Pooled(), SubspaceLearners(8, 10), **given | settings)


def test_with_one_learner_and_no_split_a_run_is_plain_training_by_the_margin_loss(tmp_path: Path) -> None:
    model, plain = method(optimizer=partial(torch.optim.SGD, lr=0.1)), method()
    losses = fit(model, BATCHES, tmp_path, max_epochs=2)
    optimizer = torch.optim.SGD([*plain.backbone.parameters(), *plain.head.parameters()], lr=0.1)
    expected = []
    for given in BATCHES * 2:
        z_BD = F.normalize(F.linear(plain.backbone(given["image"]), plain.head.weight, plain.head.bias), dim=1)
        loss = margin_loss(z_BD, given["label"], torch.zeros_like(given["label"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss))
    assert losses == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(model.head.weight, plain.head.weight)


class Splits(Callback):
    """What a split finds and leaves."""

    def __init__(self) -> None:
        self.at: list[int] = []
        self.freed: list[Tensor] = []
        self.moments: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        split, head = pl_module.split, pl_module.head

        def watched() -> bool:
            owner, state = head.owner_D.clone(), trainer.optimizers[0].state[head.weight]
            before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
            done: bool = split()
            if done:
                self.at.append(pl_module.current_epoch)
                self.freed.append(head.owner_D != owner)
                self.moments.append((*before.values(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
            return done

        pl_module.split = watched


def test_a_split_clears_the_moments_of_the_rows_it_draws_anew_and_no_others(tmp_path: Path) -> None:
    splits, model = Splits(), method(**SOON)
    fit(model, BATCHES, tmp_path, max_epochs=4, callbacks=[splits])
    assert splits.at == [1]  # once: no validation says that it has helped
    assert model.head.learners == 2
    ((freed_D,), ((*before, first, second),)) = splits.freed, splits.moments
    assert 0 < freed_D.sum() < 10
    for old, new in zip(before, (first, second), strict=True):
        assert old[freed_D].any()
        assert not new[freed_D].any()
        assert torch.equal(new[~freed_D], old[~freed_D])
        assert new[~freed_D].any()


def test_importance_is_summed_over_an_epochs_steps_from_the_optimisers_gradients(tmp_path: Path) -> None:
    model, by_hand = method(), torch.zeros(10)

    class Sums(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            by_hand.zero_()  # what matters is the last epoch

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weight, bias = pl_module.head.weight, pl_module.head.bias
            by_hand.add_((weight * weight.grad).sum(dim=1).detach() + (bias * bias.grad).detach())

    fit(model, BATCHES, tmp_path, max_epochs=2, callbacks=[Sums()])
    torch.testing.assert_close(model.importance_D, by_hand)


def test_a_resumed_run_goes_on_bit_for_bit_from_before_a_split_to_the_tuning(tmp_path: Path) -> None:
    settings = SOON | {"tune_from": 0.75}
    made: list[ADSL] = []

    def make() -> ADSL:
        made.append(method(**settings))
        return made[-1]

    method_runs.resumes(make, BATCHES, tmp_path, (2, 3, 4, 9), callbacks=[RandomState(0)], max_epochs=4)
    assert all(model.head.learners == 2 and model.tuning for model in made)


def test_clusters_are_as_many_as_learners_and_a_batch_compares_rows_of_a_cluster_in_its_slice(tmp_path: Path) -> None:
    model = method(**SOON)
    fit(model, BATCHES, tmp_path, max_epochs=3)
    assert set(model.cluster_M.tolist()) == {0, 1}
    given = BATCHES[1]
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    cluster_B, a_BD = model.cluster_M[given["index"]], model.head(model.backbone(given["image"]))
    z_BD = torch.stack([a * (model.head.owner_D == c) for a, c in zip(a_BD, cluster_B, strict=True)])
    expected = margin_loss(F.normalize(z_BD, dim=1), given["label"], cluster_B)
    torch.testing.assert_close(model.training_step(given, 0), expected)
    assert len(set(cluster_B.tolist())) == 2


def test_clusters_are_of_directions_and_keep_their_numbers(tmp_path: Path) -> None:
    model = method(**SOON)
    fit(model, BATCHES, tmp_path, max_epochs=1)
    torch.testing.assert_close(model.memory.rows_MF.norm(dim=1), torch.ones(36))
    before = torch.arange(36) % 2
    model.cluster_M.copy_(before)
    model.memory.clusters = lambda *given: (torch.arange(36), 1 - before)  # type: ignore[method-assign]
    model.recluster(2, 1)
    assert torch.equal(model.cluster_M, before)


def test_at_the_end_one_cluster_trains_the_whole_embedding(tmp_path: Path) -> None:
    model = method(**SOON | {"tune_from": 0.5})
    fit(model, BATCHES, tmp_path, max_epochs=4)
    assert model.head.learners == 2
    assert not model.cluster_M.any()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    z_BD = F.normalize(model.head(model.backbone(BATCHES[0]["image"])), dim=1)
    expected = margin_loss(z_BD, BATCHES[0]["label"], torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close(model.training_step(BATCHES[0], 0), expected)


def run(rank: int | None, folder: str, **options: Any) -> dict[str, Tensor]:
    batches = in_float64(BATCHES)
    if rank is not None:
        batches = [in_halves(given)[rank] for given in batches]
        options |= {"devices": 2, "use_distributed_sampler": False, "strategy": "ddp"}
    model = method(**SOON | {"optimizer": partial(torch.optim.SGD, lr=0.1)}).double()
    fit(model, batches, Path(folder), max_epochs=4, **options)
    assert model.head.learners == 2
    assert model.cluster_M.any()
    return model.state_dict()


def _on_rank(rank: int, folder: str, port: int) -> None:
    rank_processes.join(rank, port)
    assert not differences(run(rank, folder), torch.load(f"{folder}/one.pt", weights_only=True))


@pytest.mark.ranks
def test_two_ranks_split_cluster_and_train_as_one_process(tmp_path: Path) -> None:
    torch.save(run(None, str(tmp_path)), tmp_path / "one.pt")
    rank_processes.start(_on_rank, 2, str(tmp_path), rank_processes.free_port())


class Scored(LightningDataModule):
    """Validation whose information is given, epoch by epoch."""

    def __init__(self, model: ADSL, nmi: list[float]) -> None:
        super().__init__()
        given = iter(nmi)
        model.retrieval = lambda z, label: {"nmi": next(given), "recall_at_1": 0.0}  # type: ignore[method-assign]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader([batch(9)], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nmi", "at"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], []),  # it goes on improving
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], [3]),  # 2 epochs after the best one, and once
        ([0.5, 0.4, 0.4, 0.6, 0.1, 0.1, 0.1], [3, 6]),  # and once more when it has improved and stalled again
    ],
)
def test_a_split_comes_patience_epochs_after_the_best_validation_and_once_each_time(
    nmi: list[float], at: list[int], tmp_path: Path
) -> None:
    model, splits = method(**SOON | {"patience": 2, "threshold": 0.8}), Splits()
    trainer = Trainer(
        max_epochs=len(nmi), callbacks=[splits], default_root_dir=tmp_path, enable_checkpointing=False,
        accelerator="cpu", **method_runs.SILENT,
    )  # fmt: skip
    trainer.fit(model, Scored(model, nmi))
    assert splits.at == at
    assert trainer.callback_metrics["val/nmi"] == pytest.approx(nmi[-1])


class Clusters(Callback):
    """Of each batch."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(set(pl_module.cluster_M[batch["index"]].tolist()))


def test_with_class_balanced_data_each_batch_is_of_one_cluster(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Shapes(batch_size=20, size=120, val_size=20, per_class=5)
    backbone = Attended(SmallConvNet(1, 4, 2))
    model = ADSL(backbone, SubspaceLearners(8, 10), 100, 10, optimizer=ADAM, **SOON | {"patience": 1})
    model.retrieval = lambda z, label: {"nmi": -1.0, "recall_at_1": 0.0}  # type: ignore[method-assign]
    seen = Clusters()
    options = method_runs.SILENT | {"enable_checkpointing": False, "accelerator": "cpu"}
    Trainer(max_epochs=3, callbacks=[seen], default_root_dir=tmp_path, **options).fit(model, data)
    assert model.head.learners == 2
    assert all(len(clusters) == 1 for clusters in seen.seen)
    assert {frozenset(clusters) for clusters in seen.seen[5:]} == {frozenset({0}), frozenset({1})}


def test_validation_tells_classes_that_are_apart() -> None:
    label = torch.arange(12) % 3
    assert method().retrieval(torch.eye(10)[label], label) == {"nmi": pytest.approx(1.0), "recall_at_1": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_one_and_one_of_one_class_have_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    for rows in (1, 3):
        model, given = method().to(dtype), batch(rows=rows)
        loss = model.training_step(given | {"image": given["image"].to(dtype), "label": torch.zeros(rows).long()}, 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert rows > 1 or loss == 0  # it has nobody to meet


def test_bad_settings_and_data_are_refused(tmp_path: Path) -> None:
    for settings, said in (
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"patience": 0}, "patience=0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"images": 0}, "images=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            method(**settings)
    with pytest.raises(UserError, match=r"head\.in_features=9, but Pooled gives 8"):
        ADSL(method_runs.Pooled(), SubspaceLearners(9, 4), 36, 3, optimizer=ADAM)
    with pytest.raises(UserError, match=r"images numbered 24 to 35, and ADSL's memory has places for \[0, images=30\)"):
        fit(method(images=30), [BATCHES[2]], tmp_path)
    options = method_runs.SILENT | {"enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **options)
    with pytest.raises(UserError, match=r"have 120 training images, and ADSL's memory holds images=36"):
        trainer.fit(method(), Shapes(size=120))
    with pytest.raises(UserError, match="labels from 0 to 2 do not fit ADSL of 2 classes"):
        fit(method(num_classes=2), BATCHES, tmp_path)
