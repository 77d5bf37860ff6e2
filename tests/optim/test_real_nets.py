"""Small nets with dead rows, trained: weights and state stay finite after every step, and losses go where AdamW's go.

The nets of benchmarks/robustness.py, which trains them for longer, and a few in which rows die for other reasons. In
each of them `LowRank`, Fira and APOLLO once wrote NaN into weights, or a loss went to 1e10, within as many steps.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from torch import Tensor, nn

from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.optimizer import LowRank

spec = importlib.util.spec_from_file_location("robustness", Path(__file__).parents[2] / "benchmarks" / "robustness.py")
assert spec is not None
assert spec.loader is not None
robustness = importlib.util.module_from_spec(spec)
sys.modules["robustness"] = robustness  # dataclasses look their module up
spec.loader.exec_module(robustness)

OURS = [name for name in robustness.NAMES if name != "AdamW"]


class Masked(nn.Module):
    """Half of the classes are masked in each batch, by logits of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 40)

    def forward(self, images: Tensor) -> Tensor:
        allowed = torch.zeros(40, dtype=torch.bool)
        allowed[:10] = True  # the labels
        allowed[torch.randint(10, 40, (10,))] = True
        return self.head(self.hidden(images.flatten(1)).tanh()).masked_fill(~allowed, -torch.inf)


def dropout() -> nn.Module:
    """Dropout before a narrow layer, of which a batch of two sees a quarter of the columns."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Dropout(0.75), nn.Linear(128, 20))


class Bigram(nn.Module):
    """An embedding and a head, nothing else: tokens that a batch lacks leave rows of both without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(256, 48), nn.Linear(48, 256)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.tokens(tokens_BT)).transpose(1, 2)


def pairs(generator: torch.Generator) -> Iterator[Any]:
    yield from ((images[:2], labels[:2]) for images, labels in robustness.digit_batches(generator))


NETS = robustness.NETS | {
    "masked classes": robustness.Net(Masked, robustness.digit_batches),
    "dropout": robustness.Net(dropout, pairs),
    "embedding and head": robustness.Net(Bigram, robustness.text_batches),
}


def trace(net: str, name: str, factor: float, steps: int, dtype: torch.dtype = torch.float32) -> Any:
    rate = robustness.rate(name, factor)
    return robustness.train(NETS[net], lambda model: robustness.optimizer(name, model, rate), steps, dtype)


def require_sane(found: Any, steps: int, net: str) -> None:
    """All steps taken, and no batch worse than a fresh net with a few unlucky logits."""
    assert found.stopped is None
    assert len(found.losses) == steps
    assert max(found.losses) < 3 * found.losses[0] + (10 if net == "dropout" else 0), max(found.losses)


@pytest.mark.sample(5)
@pairwise(net=NETS, name=["LowRank", "FiraAdam", "APOLLO"], dtype=[torch.float32, torch.bfloat16])
def test_what_rescales_rows_trains_where_rows_die(name, net, dtype):
    steps = 40
    found = trace(net, name, 1.0, steps, dtype)
    require_sane(found, steps, net)
    assert found.farthest < 20  # the farthest that AdamW took in these runs is 5


@pytest.mark.sample(4)
@pairwise(
    name=[name for name in OURS if name not in ("LowRank", "FiraAdam", "APOLLO")],
    net=["ReLU MLP", "mixture of experts", "embedding and head"],
    dtype=[torch.float32, torch.bfloat16],
)
def test_so_do_all_other_presets(name, net, dtype):
    steps = 20
    require_sane(trace(net, name, 1.0, steps, dtype), steps, net)


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rate", [1e-3, 3e-3])
def test_a_relu_mlp_in_the_projects_groups_trains(rate, seed, monkeypatch):
    """Not one of these runs once got to step 241."""
    monkeypatch.setattr(robustness, "SEED", seed)
    steps = 100

    def make(model: nn.Module) -> LowRank:
        return LowRank(ParameterGroups().build(model), lr=rate, rank=32)

    found = robustness.train(NETS["ReLU MLP"], make, steps)
    require_sane(found, steps, "ReLU MLP")
    assert sum(found.losses[-10:]) / 10 < 0.8


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("net", "rank", "rate"), [("CNN", 4, 3e-2), ("ReLU MLP", 4, 3e-2), ("char transformer", 1, 3e-3)]
)
def test_no_step_jumps_at_low_ranks_and_high_rates(net, rank, rate):
    """Once single steps of 1e10 times the rate, losses of 1e10 and 1e27; at rank 1 steps of thousands."""
    steps = 60
    found = robustness.train(NETS[net], lambda model: LowRank(model.named_parameters(), rate, rank), steps)
    assert found.stopped is None
    assert len(found.losses) == steps
    assert max(found.losses) < 10
    assert found.farthest < 30


def test_two_steps_in_which_a_row_loses_its_gradient():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(128, 128))
    optimizer = LowRank([weight])
    for alive in (1, 0, 0):
        weight.grad = torch.randn(128, 128)
        weight.grad[0] *= alive
        optimizer.step()
        assert weight.isfinite().all()
        assert optimizer.state[weight]["limiter"].isfinite()


def test_an_embedding_and_a_head_of_one_batch():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(1000, 128), nn.Linear(128, 1000)
    optimizer = LowRank([embedding.weight, head.weight])
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(embedding(torch.randint(1000, (64,)))), torch.randint(1000, (64,))).backward()
        optimizer.step()
        assert embedding.weight.isfinite().all()
        assert head.weight.isfinite().all()
