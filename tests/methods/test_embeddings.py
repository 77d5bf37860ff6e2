"""What the collapse sentinel reads of every method that says what it compares, or has prototypes."""

import importlib
import os
import pkgutil
from pathlib import Path
from typing import Any

import method_runs
import pytest
import rank_processes
import torch
from lightning import Callback
from torch import Tensor

import lightspan.methods
from lightspan.callbacks.watching.detached import detached
from lightspan.callbacks.watching.held_samples import single_views
from lightspan.method import Method
from lightspan.strategies import FSDP2


def found() -> dict[str, type[Method]]:
    """Methods that define one of the contract's three names, by module in their package."""
    named = {}
    for info in pkgutil.walk_packages(lightspan.methods.__path__, "lightspan.methods."):
        for one in vars(importlib.import_module(info.name)).values():
            own = isinstance(one, type) and issubclass(one, Method) and one.__module__ == info.name
            if own and {"embeddings", "projector", "assignments"} & vars(one).keys():
                named[info.name.removeprefix("lightspan.methods.")] = one
    return named


METHODS = found()
WITH_PROTOTYPES = [name for name, method in METHODS.items() if hasattr(method, "assignments")]


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A small one from its own tests, with what the sentinel gives it of a batch."""
    family, _, own = name.partition(".")
    tests = importlib.import_module(f"tests.methods.{family}.test_{own}")
    return tests.method(), next(single_views(getattr(tests, "batch", method_runs.batch)()))


def test_the_contract_is_held_by_those_that_need_it() -> None:
    assert {"contrastive.moco", "distillation.dino", "image_text.clip"} <= METHODS.keys()
    assert {"distillation.dino", "clustering.swav"} <= set(WITH_PROTOTYPES) < METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_and_assignments_are_of_each_sample_alone_and_change_nothing(name: str) -> None:
    model, given = made(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes, drawn = [part.training for part in model.modules()], torch.get_rng_state()
    alone = {key: rows[:1] for key, rows in given.items()}
    for read in ("embeddings", "assignments") if name in WITH_PROTOTYPES else ("embeddings",):
        with detached(model):
            seen, one = getattr(model, read)(given), getattr(model, read)(alone)
        assert seen.shape == (len(given["image"]), one.shape[1])
        assert seen.isfinite().all()
        torch.testing.assert_close(one, seen[:1])  # whatever else is in the batch
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_PROTOTYPES)
def test_assignments_are_distributions_without_gradients(name: str, dtype: torch.dtype) -> None:
    model, given = made(name)
    share_BK = model.to(dtype).eval().assignments(given | {"image": given["image"].to(dtype)})
    assert share_BK.dtype == torch.float32
    assert not share_BK.requires_grad
    assert share_BK.min() >= 0
    torch.testing.assert_close(share_BK.sum(dim=1), torch.ones(len(share_BK)))


class Compares(Callback):
    """With what was seen of the whole network."""

    def __init__(self, given: dict[str, Any], whole: list[Tensor]) -> None:
        self.given, self.whole, self.compared = given, whole, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with detached(pl_module):
            torch.testing.assert_close([*read(pl_module, self.given)], self.whole)
        self.compared = True


def read(model: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return model.embeddings(given), model.assignments(given)


def _sharded(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for name in WITH_PROTOTYPES:
        (model, given), (whole, _) = made(name), made(name)
        with detached(whole):
            compares = Compares(given, [*read(whole, given)])
        options: dict[str, Any] = {"strategy": FSDP2(), "devices": 2, "use_distributed_sampler": False}
        method_runs.fit(model, [method_runs.batch(seed=0)], Path(folder), callbacks=[compares], **options)
        assert compares.compared


@pytest.mark.ranks
def test_sharded_methods_give_what_whole_ones_give(tmp_path: Path) -> None:
    rank_processes.start(_sharded, 2, str(tmp_path), rank_processes.free_port())
