"""The strategy DDP: a process that starts in the middle of a run sums gradients as one that was there all along."""

import datetime
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from waiting import HANG_S

from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.training.strategies import DDP, FixedBuckets

STEPS, STOP = 5, 2
FORMS = {
    "plain": {},
    "several buckets": {"bucket_cap_mb": 0.002},
    "views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
}


class Net(nn.Module):
    """Registered in another order than that in which gradients arrive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out, self.middle, self.first = nn.Linear(17, 5), nn.Linear(31, 17), nn.Linear(13, 31)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.out(self.middle(self.first(x_BD).tanh()).tanh())


def gradients_of(group: dist.ProcessGroup, starts: list[int], wrapper: type, **settings: object) -> torch.Tensor:
    """The gradients of STEPS steps; each step in `starts` is the first one of a process."""
    net = Net()
    optimizer, gradients = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9), []
    for first, last in zip(starts, [*starts[1:], STEPS], strict=True):
        wrapped = wrapper(net, process_group=group, **settings)
        for step in range(first, last):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            optimizer.zero_grad()
            wrapped(torch.randn(8, 13, generator=generator)).square().mean().backward()
            gradients += [parameter.grad.flatten().clone() for parameter in net.parameters()]
            optimizer.step()
    return torch.cat(gradients)


def one_rank(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=HANG_S)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout, rank=index, world_size=4)
    groups, same = {4: dist.group.WORLD, 3: dist.new_group([0, 1, 2])}, {}
    for ranks, group in groups.items():
        if index < ranks:
            for form, settings in FORMS.items():
                straight, resumed = (gradients_of(group, at, FixedBuckets, **settings) for at in ([0], [0, STOP]))
                same[f"{form} on {ranks}"] = torch.equal(straight, resumed)
            plain = [gradients_of(group, at, DistributedDataParallel) for at in ([0], [0, STOP])]
            same[f"torch on {ranks}"] = torch.equal(*plain)
    if index == 0:
        torch.save(same, Path(folder, "same.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    folder = tmp_path_factory.mktemp("ddp")
    rank_processes.start(one_rank, 4, rank_processes.free_port(), str(folder))
    return torch.load(folder / "same.pt", weights_only=True)


@pytest.mark.ranks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_resumed_process_of_three_and_four_ranks_has_every_bit_of_the_straight_ones_gradients(same, form, ranks):
    assert same[f"{form} on {ranks}"]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [3, 4])
def test_with_torch_alone_it_does_not(same, ranks):
    """Otherwise the test above could not fail, and `FixedBuckets` would have become needless."""
    assert not same[f"torch on {ranks}"]


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "ddp_find_unused_parameters_true", "auto", {"class_path": "lightning.pytorch.strategies.DDPStrategy"}],
)
def test_however_a_recipe_writes_ddp_it_gets_this_one(strategy, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"base: compression/vit\ntrainer: {{accelerator: cpu, devices: 3, strategy: {strategy}}}\n".replace("'", "")
    )
    trainer = build(resolve(str(tmp_path / "r.yaml"))).trainer
    assert type(trainer.strategy) is DDP
    assert trainer.strategy._ddp_kwargs.get("find_unused_parameters", False) == ("true" in str(strategy))


def test_a_trainer_of_ones_own_keeps_lightnings_until_it_names_this_one():
    quiet = {"accelerator": "cpu", "devices": 3, "logger": False, "enable_checkpointing": False}
    assert isinstance(Trainer(strategy=DDPStrategy(), **quiet).strategy, DDPStrategy)
    assert type(Trainer(strategy=DDP(find_unused_parameters=True), **quiet).strategy) is DDP
