"""Counting a step: what a hand count gives, what a real step gives, and nothing else."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightspan.cli.planning.step_memory import (
    OptimizerStopped,
    StepCounter,
    StepMemory,
    faked,
    idle_state_bytes,
    largest_rows,
)
from lightspan.core.batches import rows_in
from lightspan.core.collate import resized
from lightspan.core.memory import state_bytes
from lightspan.optim.low_rank.optimizer import LowRank

FLOAT = 4
ROWS, IN, HIDDEN, OUT = 8, 32, 64, 16


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, IN), "y": torch.randn(ROWS, OUT)}


@contextlib.contextmanager
def on_fakes(module: nn.Module, fake: bool) -> Iterator[None]:
    if not fake:
        yield
        return
    mode = FakeTensorMode()
    with faked(module, mode), mode:
        yield


def measure(module: nn.Module, fake: bool, optimizer: Any = torch.optim.AdamW, passes: int = 1) -> StepMemory:
    def loss(data: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(module(data["x"]), data["y"])

    with on_fakes(module, fake):
        return StepCounter(module, loss, lambda: [optimizer(module.parameters())], passes).count(resized(batch(), ROWS))


@pytest.mark.parametrize("fake", [True, False])
def test_an_mlp_holds_what_a_hand_counts(fake: bool) -> None:
    found = measure(mlp(), fake)
    numbers = IN * HIDDEN + HIDDEN + HIDDEN * OUT + OUT
    assert found.weights == found.gradients == FLOAT * numbers
    # Kept for backward: the ReLU's output, which is also the second layer's input, and the prediction.
    assert found.activations == FLOAT * ROWS * (HIDDEN + OUT)
    assert found.batch == FLOAT * ROWS * (IN + OUT)
    # AdamW: two moments for each number, and a step count for each of the four parameters.
    assert found.optimizer_state == FLOAT * (2 * numbers + 4)
    assert found.rows == ROWS


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters),
        torch.optim.RMSprop,
    ],
    ids=["adamw", "fused", "momentum", "sgd", "rmsprop"],
)
def test_planned_optimizer_state_equals_the_real_one(optimizer: Any) -> None:
    module = mlp()
    planned = measure(module, fake=True, optimizer=optimizer).optimizer_state
    real = optimizer(module.parameters())
    module(torch.randn(ROWS, IN)).sum().backward()
    real.step()
    assert planned == state_bytes(real)


def test_a_fake_step_counts_what_a_real_one_does() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(4))
    images = torch.randn(5, 3, 8, 8)
    module(images)
    found = []
    for fake in (True, False):
        with on_fakes(module, fake):
            data = resized(images, 5)
            counter = StepCounter(module, lambda x: module(x).sum(), lambda: [torch.optim.AdamW(module.parameters())])
            found.append(counter.count(data))
    assert found[0] == found[1]


@pytest.mark.sample(1)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p: LowRank(p, rank=4, check_finite=False)])
def test_a_batch_of_another_size_counts_as_if_it_were_the_first(optimizer: Any) -> None:
    """Its optimisers take no step of their own."""
    module, steps = mlp(), []

    def make() -> list[torch.optim.Optimizer]:
        made = optimizer(module.parameters())
        made.register_step_post_hook(lambda *_: steps.append(1))
        return [made]

    def loss(data: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(module(data["x"]), data["y"])

    with on_fakes(module, True):
        counter = StepCounter(module, loss, make)
        found = [counter.count(resized(batch(), rows)) for rows in (ROWS, 500, 3)]
    assert len(steps) == 2
    for rows, one in zip((ROWS, 500, 3), found, strict=True):
        with on_fakes(module, True):
            assert one == StepCounter(module, loss, make).count(resized(batch(), rows))


def test_the_peak_lies_between_what_must_be_alive_and_the_sum_of_everything() -> None:
    found = measure(mlp(), fake=True)
    kept = found.weights + found.batch + found.optimizer_state
    assert kept + found.activations <= found.peak
    assert kept + found.gradients <= found.peak
    # AdamW's own temporaries are no larger than a few copies of the weights.
    assert found.peak <= kept + found.activations + found.gradients + 4 * found.weights


def test_accumulated_gradients_are_alive_while_the_next_activations_are() -> None:
    wide = nn.Linear(256, 256, bias=False)

    def peak(passes: int) -> int:
        with on_fakes(wide, True):
            data = torch.zeros(256, 256)
            return StepCounter(wide, lambda x: wide(x).square().sum(), list, passes).count(data).peak

    assert peak(2) == peak(1) + FLOAT * 256 * 256


def test_shared_weights_count_once_and_stay_shared() -> None:
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight
    with on_fakes(tied, True):
        assert tied[1].weight is tied[0].weight
        found = StepCounter(tied, lambda x: tied(x).sum(), list).count(torch.zeros(3, dtype=torch.int64))
    assert found.weights == found.gradients == FLOAT * 10 * 4


def test_a_module_on_the_meta_device_counts_as_one_with_numbers() -> None:
    with torch.device("meta"):
        tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    tied[1].weight = tied[0].weight
    tied[0].weight.marked = True
    tied[2].weight.requires_grad_(False)
    real = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    real[1].weight = real[0].weight
    real[2].weight.requires_grad_(False)
    found = []
    for module in (tied, real):
        with on_fakes(module, True):
            assert module[1].weight is module[0].weight
            tokens = torch.zeros(3, dtype=torch.int64)
            make = partial(torch.optim.AdamW, [p for p in module.parameters() if p.requires_grad])
            found.append(
                StepCounter(module, lambda x, net=module: net(x).sum(), lambda make=make: [make()]).count(tokens)
            )
            assert module is real or module[0].weight.marked
    assert found[0] == found[1]
    assert all(tensor.is_meta for tensor in (*tied.parameters(), *tied.buffers()))


def test_a_module_gets_its_own_tensors_back_unchanged_even_after_an_error() -> None:
    module = mlp().append(nn.BatchNorm1d(OUT))
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    measure(module, fake=True)
    with pytest.raises(KeyError), on_fakes(module, True):
        raise KeyError
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert all(parameter.grad is None for parameter in module.parameters())


def test_an_optimizer_that_reads_numbers_is_told_apart_from_a_failing_model() -> None:
    with pytest.raises(OptimizerStopped, match=r"Adafactor: it reads a number from a tensor"):
        measure(mlp(), fake=True, optimizer=torch.optim.Adafactor)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
def test_state_after_a_step_on_zero_gradients_is_the_state_of_training(optimizer: Any) -> None:
    trained = measure(mlp(), fake=False, optimizer=optimizer).optimizer_state
    idle = mlp()
    assert idle_state_bytes(idle, [optimizer(idle.parameters())]) == trained > 0


def test_resizing_changes_the_sample_axis_only() -> None:
    data = {
        "image": torch.zeros(4, 3, 8, 8),
        "label": torch.zeros(4, dtype=torch.int64),
        "scale": torch.zeros(3),
        "name": "x",
    }
    larger = resized(data, 9)
    assert rows_in(larger) == 9
    assert {k: tuple(v.shape) for k, v in larger.items() if isinstance(v, Tensor)} == {
        "image": (9, 3, 8, 8),
        "label": (9,),
        "scale": (3,),
    }
    assert larger["label"].dtype == torch.int64
    assert larger["name"] == "x"


@given(st.integers(0, 10_000), st.integers(1, 500), st.integers(0, 3), st.integers(1, 100_000))
def test_the_largest_batch_fits_and_of_a_linear_step_one_more_does_not(
    base: int, per_row: int, square: int, limit: int
) -> None:
    def measure_rows(rows: int) -> StepMemory:
        return StepMemory(rows, 0, 0, 0, 0, 0, base + per_row * rows + square * rows**2)

    rows = largest_rows(limit, measure_rows, measure_rows(2), measure_rows(4))
    assert rows == 0 or measure_rows(rows).peak <= limit
    if square == 0:
        assert measure_rows(rows + 1).peak > limit
    if rows == 0:
        assert measure_rows(1).peak > limit
