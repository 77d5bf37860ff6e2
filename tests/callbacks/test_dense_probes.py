"""Probes of patches, objects, depth and identities while a model trains: its steps, its ranks and its refusals."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.callbacks.watching.online_probes import OnlineProbes
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.evaluation.dense.dense_probes import CrossCameraRetrieval, DepthOrder, LinearSegmentation, PromptIoU
from lightspan.evaluation.features.features import Features
from lightspan.nn.tokens import token_features
from lightspan.training.strategies import FSDP2, shard

SIDE = 8


def scenes(count: int, seed: int) -> list[dict[str, Tensor]]:
    """8 x 8 pixels that show a mask, a depth and who it is, with noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        mask = torch.randint(3, (4, 4), generator=generator).repeat_interleave(2, 0).repeat_interleave(2, 1)
        depth = 1 + torch.rand(4, 4, generator=generator).repeat_interleave(2, 0).repeat_interleave(2, 1)
        who = torch.randint(4, (), generator=generator)
        image = torch.stack([mask == 1, mask == 2, depth, who.float().expand(SIDE, SIDE)]).float()
        image += 0.3 * torch.randn(image.shape, generator=generator)
        fields = {"segmentation": mask, "objects": mask, "depth": depth, "identity": who}
        found.append({"image": image, "camera": torch.tensor(index % 3), "index": torch.tensor(index), **fields})
    return found


class Data(LightningDataModule):
    """Each rank takes every world_size-th sample, in batches of 6, so that the last batch has one."""

    def __init__(self) -> None:
        super().__init__()
        self.bank, self.val = scenes(31, 1), scenes(19, 2)

    def loader(self, data: list[dict[str, Tensor]], shuffle: bool = False) -> DataLoader:
        mine: Any = data[self.trainer.global_rank :: self.trainer.world_size]  # type: ignore[union-attr]
        return DataLoader(mine, 6, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.bank[:24], shuffle=True)

    def bank_dataloader(self) -> DataLoader:
        return self.loader(self.bank, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val)


class Patches(nn.Module):
    """[B 4 8 8] -> a map [B 6 4 4], with dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(4, 6, 2, stride=2), nn.BatchNorm2d(6), nn.Dropout(0.3)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self.stem, self.drop]

    def forward(self, image: Tensor) -> Tensor:
        return self.drop(self.norm(self.stem(image)).tanh())


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Patches()

    def configure_model(self) -> None:
        shard(self)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone(batch["image"]).flatten(2).mean(dim=2)

    def token_features(self, batch: dict[str, Tensor], layers: Any = (-1,)) -> Any:
        return token_features(self.backbone, lambda: self.features(batch), layers)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.features(batch) - batch["identity"][:, None]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def probes(**settings: Any) -> OnlineProbes:
    kinds = {
        "segmentation": LinearSegmentation(l2=[1.0, 100.0], max_iterations=15),
        "depth": DepthOrder(),
        "prompt": PromptIoU(),
        "retrieval": CrossCameraRetrieval(),
    }
    return OnlineProbes(kinds, **settings)


LOGGED = {
    *("probe/segmentation_mean_iou", "probe/segmentation_pixel_accuracy", "probe/segmentation_l2"),
    *("probe/depth_order_accuracy", "probe/prompt_iou", "probe/prompt_threshold"),
    *("probe/retrieval_mean_average_precision", "probe/retrieval_rank_1", "probe/effective_rank"),
}


def all_of(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def test_figures_are_those_of_the_probes_on_the_maps_of_all_samples(make_trainer: Any) -> None:
    module, data = Net(), Data()
    (logged,) = make_trainer(callbacks=[probes()]).validate(module, datamodule=data, verbose=False)
    assert logged.keys() == LOGGED
    module.eval()
    sides = []
    for samples in (data.bank, data.val):
        fields = all_of(samples)
        with torch.no_grad():
            (tokens,) = module.token_features(fields)
        sides.append(Features(tokens.tokens_BTD, grid=tokens.grid, fields=fields))
    found = LinearSegmentation(l2=[1.0, 100.0], max_iterations=15).fit(*sides)
    assert logged["probe/segmentation_mean_iou"] == pytest.approx(found.scores["mean_iou"], rel=1e-6)
    assert logged["probe/depth_order_accuracy"] == pytest.approx(DepthOrder().fit(*sides).scores["order_accuracy"])
    assert logged["probe/prompt_iou"] == pytest.approx(PromptIoU().fit(*sides).scores["iou"])
    pooled = Features(sides[1].x.mean(dim=1), fields=sides[1].fields)
    assert logged["probe/retrieval_rank_1"] == pytest.approx(
        CrossCameraRetrieval().fit(pooled, pooled).scores["rank_1"]
    )
    assert logged["probe/segmentation_mean_iou"] > 0.5  # chance is a fifth
    assert logged["probe/depth_order_accuracy"] > 0.6


def test_training_is_bit_identical_with_and_without_them(make_trainer: Any) -> None:
    runs = []
    for callbacks in ([], [probes(every_n_steps=2)]):
        module = Net()
        trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks)
        seed_everything(3, verbose=False)
        trainer.fit(module, datamodule=Data())
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        runs.append([*module.state_dict().values(), *moments, draws])
    assert "probe/retrieval_rank_1" in trainer.callback_metrics
    assert len(runs[0]) > 15
    assert all(torch.equal(without, with_it) for without, with_it in zip(*runs, strict=True))


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    strategies: dict[str, Any] = {"ddp": "ddp", "fsdp2": FSDP2()}
    for name, strategy in strategies.items():
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=strategy, logger=False, callbacks=[probes(layers=[0, -1])], **quiet
        )
        (metrics,) = trainer.validate(Net(), datamodule=Data(), verbose=False)
        Path(folder, f"{name} {rank}.json").write_text(json.dumps(metrics))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_log_what_one_logs(make_trainer: Any, tmp_path: Path) -> None:
    """Uneven shares of 31 and 19 samples; layers as well."""
    rank_processes.start(one_rank, 2, str(tmp_path))
    (alone,) = make_trainer(callbacks=[probes(layers=[0, -1])]).validate(Net(), datamodule=Data(), verbose=False)
    assert alone.keys() == {f"{name}/layer_{layer}" for name in LOGGED for layer in (0, -1)}
    for file in (files := list(tmp_path.glob("*.json"))):
        assert json.loads(file.read_text()) == {name: pytest.approx(value, rel=1e-5) for name, value in alone.items()}
    assert len(files) == 4


def test_retrieval_alone_reads_no_bank(make_trainer: Any) -> None:
    class NoBank(Data):
        bank_dataloader = None  # type: ignore[assignment]

    (logged,) = make_trainer(callbacks=[OnlineProbes({"retrieval": CrossCameraRetrieval()})]).validate(
        Net(), datamodule=NoBank(), verbose=False
    )
    assert "probe/retrieval_rank_1" in logged


def test_of_many_validation_samples_some_are_enough(make_trainer: Any) -> None:
    rows = []

    class Rows(DepthOrder):
        def fit(self, bank: Features, query: Features) -> Any:
            rows.append((len(bank), len(query)))
            return super().fit(bank, query)

    class Samples:
        def __init__(self, samples: list[dict[str, Tensor]]) -> None:
            self.samples = samples

        def __len__(self) -> int:
            return len(self.samples)

        def sample(self, index: int, seed: int) -> dict[str, Tensor]:
            return self.samples[index]

    class Even(Data):
        def val_dataloader(self) -> Any:
            return EvaluationLoader(Samples(self.val), 6)

    watching = OnlineProbes({"depth": Rows()}, val_samples=7)
    make_trainer(callbacks=[watching]).validate(Net(), datamodule=Even(), verbose=False)
    assert rows == [(31, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sample: sample.pop("depth"), r"no depth: it contains \['camera', 'identity', 'image'"),
        (lambda sample: sample.update(depth=torch.zeros(3)), "DepthOrder reads 'depth' of the batches, a map"),
        (lambda sample: sample.update(objects=torch.zeros(8, 8)), "PromptIoU reads 'objects' .* whole numbers"),
        (lambda sample: sample.update(camera=torch.tensor(0.5)), "CrossCameraRetrieval reads 'camera'"),
    ],
)
def test_what_they_cannot_read_is_named_before_the_first_step(make_trainer: Any, change: Any, message: str) -> None:
    data = Data()
    for sample in data.val:
        change(sample)

    class Steps(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise AssertionError("a step ran")

    trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[probes(), Steps()])
    with pytest.raises(UserError, match=message):
        trainer.fit(Net(), datamodule=data)


def test_maps_of_several_sizes_are_named(make_trainer: Any) -> None:
    data = Data()
    for sample in data.val[6:]:
        sample["depth"] = torch.ones(4, 4)
    with pytest.raises(UserError, match=r"depth of the batches for the probes has the sizes \[\[4, 4\], \[8, 8\]\]"):
        make_trainer(callbacks=[probes()]).validate(Net(), datamodule=data, verbose=False)
