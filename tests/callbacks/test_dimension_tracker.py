"""DimensionTracker against dense SVDs of the same gradients, weights and features; on one rank and on two."""

import json
import os
from pathlib import Path

import pytest
import rank_processes
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from rank_processes import free_port
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.watching.dimension_tracker import DimensionTracker
from lightspan.core.distributed import end_process_group, rank, world_size
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.dimension import two_nn_fit
from lightspan.evaluation.geometry.spectra import (
    effective_rank,
    energy_shares,
    leading_energy,
    participation_ratio,
    singular_values,
    stable_rank,
)
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.training.loggers.jsonl import JsonlLogger
from lightspan.training.strategies import FSDP2, shard

BATCH, SAMPLES = 16, 40
SHAPES = {"stem.weight": (12, 7), "body.0.weight": (12, 12), "body.1.weight": (12, 12), "conv.weight": (4, 9)}


class Net(LightningModule):
    """A wide, a square, a tall and a convolutional weight; every rank takes its share of each batch."""

    def __init__(self, micro_batches: int = 1, optimizer=torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(7, 12)
        self.body = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.drop = nn.Dropout(0.5 if optimizer is torch.optim.SGD else 0.0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(40, 3)
        self.micro_batches, self.optimizer = micro_batches, optimizer

    def configure_model(self) -> None:
        shard(self)

    def features(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x_BD = self.stem(batch["x"])
        for layer in self.body:
            x_BD = x_BD + layer(x_BD).tanh()
        return self.drop(x_BD)

    def training_step(self, batch: int, batch_idx: int) -> torch.Tensor:
        step, part = divmod(int(batch), self.micro_batches)
        x_BD, target_BD = (
            torch.randn(BATCH, width, generator=torch.Generator().manual_seed(step))
            .chunk(self.micro_batches)[part]
            .chunk(world_size())[rank()]
            for width in (7, 3)
        )
        features_BD = self.features({"x": x_BD})
        picture_BCHW = self.conv(features_BD[:, None, :, None].expand(-1, -1, -1, 3))
        return nn.functional.mse_loss(self.head(picture_BCHW.flatten(1)), target_BD)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.features(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-2)


class Last(Callback):
    """Keeps whole gradients and weights of the last step, as the optimiser gets them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = dict(pl_module.named_parameters())
        self.matrices = {("weight", name): named[name].detach().clone() for name in SHAPES}
        self.matrices |= {("gradient", name): named[name].grad.clone() for name in SHAPES}


def validation_rows() -> list[dict[str, torch.Tensor]]:
    x_ND = torch.randn(SAMPLES, 7, generator=torch.Generator().manual_seed(5))
    rows = [{"x": x_D, "index": torch.tensor(i)} for i, x_D in enumerate(x_ND)]
    return rows[rank() :: world_size()] + rows[:1]  # each rank repeats one, as samplers do that pad


def fit(folder: Path, *callbacks: Callback, net: LightningModule | None = None, **options) -> tuple[Trainer, dict]:
    """Four steps and a validation. Returns the trainer and the last value of everything that was logged."""
    net = net or Net()
    micro = getattr(net, "micro_batches", 1)
    seed_everything(1, verbose=False)
    trainer = Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": JsonlLogger(str(folder)),
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "use_distributed_sampler": False, "accumulate_grad_batches": micro, "default_root_dir": str(folder),
            "log_every_n_steps": 1000, **options,
        },
        callbacks=list(callbacks),
    )  # fmt: skip
    loaders = DataLoader(range(4 * micro), batch_size=None), DataLoader(validation_rows(), batch_size=8)
    trainer.fit(net, *loaders)
    path, found = folder / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        found |= json.loads(line)
    return trainer, {name: value for name, value in found.items() if name.startswith(("dimension", "spectrum"))}


TRACKER = {"every_n_steps": 2, "match": list(SHAPES), "rank": 3, "spectrum": 4}


def test_figures_are_those_of_dense_singular_values(tmp_path):
    last = Last()
    trainer, found = fit(tmp_path, DimensionTracker(**TRACKER), last)
    measures = {
        "effective_rank": effective_rank,
        "stable_rank": stable_rank,
        "top_energy": lambda v: leading_energy(v, 3),
    }
    for kind in ("gradient", "weight"):
        values = {name: singular_values(last.matrices[kind, name].double().flatten(1)) for name in SHAPES}
        for what, measure in measures.items():
            single = {name: measure(v).item() for name, v in values.items()}
            logged = {name: found[f"dimension/{kind}_{what}/{name}"] for name in SHAPES}
            assert logged == pytest.approx(single, rel=1e-5)
            mean = sum(single.values()) / len(single)
            assert found[f"dimension/{kind}_{what}"] == pytest.approx(mean, rel=1e-5)
            assert trainer.callback_metrics[f"dimension/{kind}_{what}"].item() == pytest.approx(mean, rel=1e-5)
        shares = torch.stack([energy_shares(v)[:4] for v in values.values()]).mean(dim=0).tolist()
        assert [found[f"spectrum/{kind}/{i}"] for i in range(4)] == pytest.approx(shares, rel=1e-5)
    assert not [name for name in trainer.callback_metrics if name.count("/") > 1]  # no figure a matrix in the summary


def test_features_are_those_of_the_validation_samples_each_once(tmp_path):
    net = Net()
    _, found = fit(tmp_path, DimensionTracker(**TRACKER), net=net)
    x_ND = torch.stack([row["x"] for row in validation_rows()[:SAMPLES]])
    features_ND = net.features({"x": x_ND}).detach()
    centred = singular_values(features_ND.double(), center=True)
    assert found["dimension/features_two_nn"] == pytest.approx(two_nn_fit(features_ND).item(), rel=1e-3)
    assert found["dimension/features_participation_ratio"] == pytest.approx(
        participation_ratio(centred).item(), rel=1e-4
    )
    shares = [found[f"spectrum/features/{i}"] for i in range(4)]
    assert shares == pytest.approx(energy_shares(centred)[:4].tolist(), rel=1e-4)


def test_accumulated_gradients_count_whole(tmp_path):
    straight = fit(tmp_path / "straight", DimensionTracker(**TRACKER))[1]
    accumulated = fit(tmp_path / "accumulated", DimensionTracker(**TRACKER), net=Net(micro_batches=4))[1]
    assert accumulated == pytest.approx(straight, rel=1e-4)


def test_training_is_bit_identical_with_and_without_it(tmp_path):
    ends = []
    for callbacks in ([], [DimensionTracker(every_n_steps=1)]):
        net = Net(optimizer=torch.optim.SGD)  # with dropout
        fit(tmp_path, *callbacks, net=net)
        ends.append([*net.state_dict().values(), torch.rand(())])
    assert all(torch.equal(without, with_it) for without, with_it in zip(*ends, strict=True))


def test_it_measures_in_its_own_rhythm_and_before_the_last_step(tmp_path):
    fit(tmp_path, DimensionTracker(every_n_steps=3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "dimension/gradient_top_energy" in line] == [2]  # two steps finished
    assert {line["step"] for line in lines if any(name.startswith("spectrum/features") for name in line)} == {3}


class Bare(LightningModule):
    """Anyone's module: no features(batch), and batches that are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def training_step(self, batch: int, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(2, 5)).sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_modules_without_features_are_tracked_by_their_matrices(tmp_path):
    found = fit(tmp_path, DimensionTracker(every_n_steps=2), net=Bare())[1]
    assert found["dimension/gradient_effective_rank/layer.weight"] == pytest.approx(1, abs=1e-6)
    assert not [name for name in found if "features" in name]


def test_collapsed_features_and_gradients_that_are_not_finite_are_null(tmp_path):
    class Collapsed(Net):
        def features(self, batch):
            return 0 * super().features(batch)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.nan if int(batch) == 3 else 1)

    found = fit(tmp_path, DimensionTracker(**TRACKER), net=Collapsed())[1]
    assert found["dimension/features_two_nn"] is None
    assert found["dimension/gradient_effective_rank/body.0.weight"] is None
    assert found["dimension/weight_stable_rank/body.0.weight"] > 1


def one_rank(index: int, port: int, folder: str) -> None:
    """Under the environment of torchrun, so that Lightning starts no processes of its own."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    for name, strategy in (("ddp", "ddp"), ("fsdp2", FSDP2())):
        fit(Path(folder, name), DimensionTracker(**TRACKER), devices=2, strategy=strategy)
    end_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.start(one_rank, 2, free_port(), str(folder))
    found = {}
    for name in ("ddp", "fsdp2"):
        logged = {}
        for line in (folder / name / "metrics.jsonl").read_text().splitlines():
            logged |= json.loads(line)
        found[name] = {key: value for key, value in logged.items() if key.startswith(("dimension", "spectrum"))}
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_log_what_one_does(on_two_ranks, strategy, tmp_path):
    assert on_two_ranks[strategy] == pytest.approx(fit(tmp_path, DimensionTracker(**TRACKER))[1], rel=1e-4)


def test_gradients_in_coordinates_are_refused(tmp_path):
    def low_rank(parameters, lr):
        return LowRank(parameters, lr=lr, rank=2, residual=None, refresh=9, backward="hooks")

    with pytest.raises(UserError, match="keeps only their coordinates; set backward='whole'"):
        fit(tmp_path, DimensionTracker(), net=Net(optimizer=low_rank))


def test_patterns_without_a_match_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'\*attention\*' matches no trained matrix of Net; names look like"):
        fit(tmp_path, DimensionTracker(match=["*attention*"]))


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"rank": 0}, {"spectrum": -1}, {"samples": -1}])
def test_numbers_out_of_range_are_told(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* must be at least"):
        DimensionTracker(**wrong)
