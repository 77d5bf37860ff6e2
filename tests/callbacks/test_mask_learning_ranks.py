"""MaskLearning on two ranks: replicated (DDP) and sharded (FSDP2) models get the masks of one process."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from lightning import Callback, LightningModule, Trainer
from rank_processes import free_port
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.core.distributed import end_process_group, rank, world_size
from lightspan.core.sharded import whole
from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.learner import MaskLearner
from lightspan.subspaces.masks.allocation import Allocation, AllTogether, ErdosRenyi
from lightspan.subspaces.masks.schedules import Cubic
from lightspan.subspaces.masks.scores import Movement
from lightspan.training.strategies import FSDP2, shard

BATCH, STEPS = 16, 10
ADAM = partial(torch.optim.Adam, lr=0.1)
ARMS: dict[str, tuple[Callable[[], MaskLearner], Allocation]] = {
    "concrete": (lambda: ByGradient(optimizer=ADAM), AllTogether()),
    "movement": (lambda: ByScore(Movement(), memory=1.0, every=2), AllTogether()),
    "drop and grow": (lambda: DropAndGrow(every=2), ErdosRenyi()),
}


class Net(LightningModule):
    """A wide and a tall weight, one with an odd number of rows, and one of whose one row the second rank has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle, self.head = nn.Linear(7, 12), nn.Linear(12, 5), nn.Linear(5, 1)
        self.double()

    def configure_model(self) -> None:
        shard(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x_BD = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(int(batch)), dtype=torch.float64)
        x_BD = x_BD.chunk(world_size())[rank()]
        y_B = self.head(self.middle(self.stem(x_BD).tanh()).tanh())[:, 0]
        return (y_B - x_BD[:, :3].sin().sum(1)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Under FSDP2 leaves the parameters of the root gathered, as they are while it is validated."""
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def numbers(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "kind"}


class StateAtTheStart(Callback):
    """After MaskLearning, the state that it goes on from."""

    def __init__(self, of: MaskLearning) -> None:
        self.of, self.found = of, dict[str, Any]()

    def on_train_batch_start(self, *rest: Any) -> None:
        self.found = self.found or numbers(self.of.state_dict())


def train(kind: str, folder: Path, devices: int = 1, strategy: Callable[[], Any] = lambda: "auto") -> dict[str, Any]:
    """Masks, weights, the state in the middle of learning, and what a new callback that was given that state has."""
    make, allocation = ARMS[kind]
    found: dict[str, Any] = {}

    def callback(until: float) -> MaskLearning:
        masks = folder / f"{kind}.safetensors"
        return MaskLearning(["*.weight"], make(), Cubic(1.0, 0.3), allocation=allocation, until=until, path=str(masks))

    class Middle(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.global_step == STEPS // 2:
                found["state"] = numbers(learned.state_dict())

    def fit(callbacks: list[Callback], steps: int) -> Net:
        net = Net()
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=1, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            use_distributed_sampler=False, val_check_interval=3, num_sanity_val_steps=1,
            devices=devices, strategy=strategy(),
        )  # fmt: skip
        trainer.fit(net, DataLoader(torch.arange(STEPS)), DataLoader(torch.arange(1)))
        return net

    learned = callback(until=0.8)
    net = fit([learned, Middle()], STEPS)
    found |= {"masks": learned.masks}
    found["weights"] = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    given = callback(until=0.8)
    given.load_state_dict(found["state"])
    at_start = StateAtTheStart(given)
    fit([given, at_start], 1)
    found["again"] = at_start.found
    return found


def one_rank(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    for name, strategy in (("ddp", lambda: "ddp"), ("fsdp2", FSDP2)):
        for kind in ARMS:
            found = train(kind, Path(folder), devices=2, strategy=strategy)
            torch.save(found, Path(folder, f"{name}, {kind}, {index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.start(one_rank, 2, free_port(), str(folder))
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {kind: train(kind, tmp_path_factory.mktemp("one")) for kind in ARMS}


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ARMS)
def test_two_ranks_have_the_masks_of_one_process(on_two_ranks, on_one, kind: str, strategy: str) -> None:
    one = on_one[kind]
    for index in (0, 1):
        two = on_two_ranks[f"{strategy}, {kind}, {index}"]
        assert all(torch.equal(two["masks"][name], mask) for name, mask in one["masks"].items())
        for what in ("weights", "state", "again"):
            torch.testing.assert_close(two[what], one[what], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(two["again"], two["state"], rtol=0, atol=0)
    assert 0 < sum(int(mask.sum()) for mask in one["masks"].values()) < sum(m.numel() for m in one["masks"].values())
