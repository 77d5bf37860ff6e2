"""The strategy FSDP2 through Lightning's Trainer: the losses of one process, validation that does not divide evenly, a
checkpoint that changes rank count, and what it refuses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import pytest
import rank_processes
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightspan.core.blocks import blocks
from lightspan.core.distributed import end_process_group, rank, world_size
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.ranks import evaluation_loader, train_loader
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.training.method import Method
from lightspan.training.strategies import FSDP2, ExactMeans

pytestmark = pytest.mark.ranks

STEPS, BATCH = 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 16), nn.Linear(16, 10)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.down(self.up(x_BD).tanh())


class Regression(Method):
    """Both blocks are sharded by themselves; `head` belongs to the module as a whole."""

    def __init__(self) -> None:
        super().__init__(lambda groups: LowRank(groups, lr=1e-2, rank=3, refresh=4))
        torch.manual_seed(0)
        self.stem = nn.Linear(7, 10)
        self.body = nn.Sequential(Block(), Block())
        self.head = nn.Linear(10, 5)
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        x_BD, target_BD = (
            torch.randn(BATCH, width, generator=generator).chunk(world_size())[rank()] for width in (7, 5)
        )
        loss = nn.functional.mse_loss(self.head(self.body(self.stem(x_BD))), target_BD)
        self.losses.append(loss.detach().double())
        return loss


def fit(
    folder: str, ranks: int, steps: int, strategy: FSDP2 | str, resume: str | None = None
) -> tuple[Trainer, Regression]:
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=steps, gradient_clip_val=0.5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = Regression()
    trainer.fit(module, DataLoader(range(3 * STEPS)), ckpt_path=resume, weights_only=True)
    return trainer, module


def global_losses(trainer: Trainer, module: Regression) -> list[float]:
    return trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean").tolist()


class Samples:
    """Sample i is a row of its own."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, seed: int) -> torch.Tensor:
        return torch.randn(7, generator=torch.Generator().manual_seed(index))


class Evaluated(Regression):
    """Logs means over samples as anybody's module does, and knows nothing of ranks."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("loss", self(batch).mean(), on_epoch=True, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x_BD))).square().sum(dim=1)


class Uneven(LightningDataModule):
    """One sample more than fills one batch of four on every rank: the first rank needs two batches for it."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.samples, self.batch_size = Samples(4 * ranks + 1), 4 * ranks

    def train_dataloader(self) -> ExactLoader:
        return train_loader(self.samples, self.batch_size, 0, 0, self.trainer)

    def val_dataloader(self) -> EvaluationLoader:
        return evaluation_loader(self.samples, self.batch_size, 0, self.trainer)

    test_dataloader = predict_dataloader = val_dataloader


def evaluate(folder: str, ranks: int, strategy: FSDP2 | str, data: Uneven) -> dict[str, float]:
    """The figures of the sanity check and of a validation inside `fit`, then of the three other passes."""
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=1, logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = Evaluated()
    trainer.fit(module, datamodule=data)
    figures = {"fit": float(trainer.callback_metrics["loss"])}
    figures["validate"] = trainer.validate(module, datamodule=data, verbose=False)[0]["loss"]
    figures["test"] = trainer.test(module, datamodule=data, verbose=False)[0]["loss"]
    predicted = torch.cat(trainer.predict(module, datamodule=data))
    figures["predict"] = float(trainer.strategy.reduce(predicted.sum(), reduce_op="sum")) / len(data.samples)
    return figures


@contextmanager
def without_inductor() -> Iterator[None]:
    """Blocks are traced and differentiated as torch.compile does it, but not turned into C++, which takes minutes."""
    whole = nn.Module.compile
    nn.Module.compile = partialmethod(whole, backend="aot_eager")
    try:
        yield
    finally:
        nn.Module.compile = whole


def one_rank(index: int, ranks: int, port: int, folder: str) -> None:
    """Under the environment of torchrun, so that Lightning starts no processes of its own."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip
    checkpoint = f"{folder}/two"
    if ranks == 2:
        trainer, module = fit(folder, ranks, STEPS, FSDP2())
        trainer.save_checkpoint(checkpoint)
        split = {
            name for name, p in module.named_parameters() if isinstance(p, DTensor) and p.to_local().shape != p.shape
        }
        again = fit(folder, ranks, STEPS, FSDP2(activation_checkpointing=True))
        with without_inductor():
            compiled = fit(folder, ranks, STEPS, FSDP2(compile=True))
        bodies = [block._compiled_call_impl for block in compiled[1].body]
        out = {
            "losses": global_losses(trainer, module),
            "split": sorted(split),
            "groups": sorted(name for name, part in module.named_modules() if isinstance(part, FSDPModule)),
            "recomputed": global_losses(*again),
            "compiled": global_losses(*compiled),
            "compiled blocks": sum(body is not None for body in bodies),
        }
    elif ranks == 4:
        trainer, module = fit(folder, ranks, STEPS, FSDP2(replicas=2))
        weight = module.body[0].up.weight
        assert isinstance(weight, DTensor)
        out = {
            "losses": global_losses(trainer, module),
            "mesh": list(weight.device_mesh.shape),
            "placements": [str(placement) for placement in weight.placements],
            "local": list(weight.to_local().shape),
        }
    elif ranks == 3:
        out = {}
    else:
        out = {"losses": global_losses(*fit(folder, ranks, 2 * STEPS, FSDP2(), resume=checkpoint))}
    if ranks in (2, 3):
        out["evaluated"] = evaluate(folder, ranks, FSDP2(), Uneven(ranks))
    torch.save(out, Path(folder, f"{ranks}-{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    folder, found = tmp_path_factory.mktemp("fsdp2"), {}
    for ranks in (2, 1, 3, 4):
        rank_processes.start(one_rank, ranks, ranks, rank_processes.free_port(), str(folder))
        found[ranks] = [torch.load(folder / f"{ranks}-{index}.pt", weights_only=True) for index in range(ranks)]
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return global_losses(*fit(str(tmp_path_factory.mktemp("one")), 1, 2 * STEPS, "auto"))


def test_two_ranks_of_a_trainer_give_the_losses_of_one_process(runs, straight):
    for out in runs[2]:
        torch.testing.assert_close(out["losses"], straight[:STEPS], rtol=1e-5, atol=0)


def test_recomputed_activations_change_no_loss(runs):
    for out in runs[2]:
        assert out["recomputed"] == out["losses"]


def test_compiled_blocks_change_no_loss(runs):
    for out in runs[2]:
        assert out["compiled blocks"] == 2
        torch.testing.assert_close(out["compiled"], out["losses"], rtol=1e-6, atol=0)


def test_two_copies_on_two_ranks_each_give_the_losses_of_one_process(runs, straight):
    for out in runs[4]:
        assert (out["mesh"], out["placements"], out["local"]) == ([2, 2], ["R", "S(0)"], [8, 10])
        torch.testing.assert_close(out["losses"], straight[:STEPS], rtol=1e-5, atol=0)


def test_a_checkpoint_of_two_ranks_goes_on_on_one(runs, straight):
    torch.testing.assert_close(runs[1][0]["losses"], straight[STEPS:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_validation_that_does_not_divide_evenly_ends_with_the_figures_of_one_process(runs, ranks, tmp_path):
    alone = evaluate(str(tmp_path), 1, "auto", Uneven(ranks))
    for out in runs[ranks]:
        assert out["evaluated"] == pytest.approx(alone, rel=1e-5)


def test_blocks_and_the_rest_are_split(runs):
    names = {name for name, _ in Regression().named_parameters()}
    for out in runs[2]:
        assert out["groups"] == ["", "body.0", "body.1"]
        assert set(out["split"]) == names


def test_blocks_are_elements_of_lists_and_of_repeating_sequentials_inner_ones_first():
    inner = nn.ModuleList([Block(), nn.Tanh()])
    outer = nn.ModuleList([nn.Sequential(inner[0], nn.Linear(10, 10))])
    mlp = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model = nn.ModuleDict({"outer": outer, "inner": inner, "mlp": mlp, "body": nn.Sequential(Block(), Block())})
    found = blocks(model)
    assert set(found) == {outer[0], inner[0], *model["body"]}
    assert found.index(inner[0]) < found.index(outer[0])


def test_means_of_whole_numbers_are_exact_above_the_largest_of_float32():
    class Alone:
        def reduce(self, tensor, group=None, reduce_op="mean"):
            return tensor

    class Exact(ExactMeans, Alone):
        pass

    count = torch.tensor(2**24 + 1)
    assert Exact().reduce(count).item() == count.item()
    assert Exact().reduce(count, reduce_op="sum") is count


@pytest.mark.parametrize("replicas", [0, -1])
def test_a_number_of_replicas_below_one_is_refused(replicas):
    with pytest.raises(UserError, match=f"replicas={replicas} must be at least 1, or 'nodes'"):
        FSDP2(replicas=replicas)


def test_replicas_that_do_not_divide_the_ranks_are_refused_with_those_that_do():
    strategy = FSDP2(replicas=4)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    with pytest.raises(UserError, match=r"replicas=4 does not divide the 6 ranks .* choose one of 1, 2, 3, 6"):
        strategy.setup_environment()


def test_a_module_that_is_not_sharded_is_refused_with_the_line_it_needs(tmp_path):
    strategy = FSDP2()
    strategy.connect(LightningModule())
    strategy._lightning_module = LightningModule()
    with pytest.raises(UserError, match=r"configure_model\(self\) call lightspan.training.strategies.shard\(self\)"):
        strategy.setup(Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False))
