"""What the collapse sentinel reads of every method that says what it compares, or has prototypes."""

from pathlib import Path
from typing import Any

import method_cases
import method_runs
import pytest
import rank_processes
import torch
from lightning import Callback
from method_cases import CASES, ROWS
from torch import Tensor, nn

from lightspan.callbacks.watching.detached import detached
from lightspan.callbacks.watching.held_samples import single_views
from lightspan.training.strategies import FSDP2

METHODS = {
    name: method
    for name, method in method_cases.METHODS.items()
    if {"embeddings", "projector", "assignments"} & vars(method).keys()
}
"""Those that define one of the contract's three names."""
WITH_PROTOTYPES = [name for name, method in METHODS.items() if hasattr(method, "assignments")]


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """With a BatchNorm behind each convolution, and what the sentinel gives the method of a batch."""
    model = CASES[name].make()
    for at, part in [*model.named_modules()]:
        if isinstance(part, nn.Conv2d):
            model.set_submodule(at, Normed(part))
    return model, next(single_views(CASES[name].batch(ROWS, 0)))


class Normed(nn.Conv2d):
    """A convolution whose rows see one another in training, and that counts what it saw."""

    def __init__(self, of: nn.Conv2d) -> None:
        bias = of.bias is not None
        super().__init__(of.in_channels, of.out_channels, of.kernel_size, of.stride, of.padding, bias=bias)  # type: ignore[arg-type]
        self.load_state_dict(of.state_dict())
        self.norm = nn.BatchNorm2d(of.out_channels)
        self.requires_grad_(of.weight.requires_grad)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(super().forward(x_BCHW))


def test_the_contract_is_held_by_those_that_need_it() -> None:
    assert {"contrastive.moco", "distillation.dino", "image_text.clip"} <= METHODS.keys()
    assert {"distillation.dino", "clustering.swav"} <= set(WITH_PROTOTYPES) < METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_and_assignments_are_of_each_sample_alone_and_change_nothing(name: str) -> None:
    model, given = made(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes, drawn = [part.training for part in model.modules()], torch.get_rng_state()
    alone = method_runs.rows_of(given, slice(0, 1))
    for read in ("embeddings", "assignments") if name in WITH_PROTOTYPES else ("embeddings",):
        with detached(model):
            seen, one = getattr(model, read)(given), getattr(model, read)(alone)
        assert seen.shape == (ROWS, one.shape[1])
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
    rank_processes.join(rank, port)
    for name in WITH_PROTOTYPES:
        (model, given), (whole, _) = made(name), made(name)
        with detached(whole):
            compares = Compares(given, [*read(whole, given)])
        options: dict[str, Any] = {"strategy": FSDP2(), "devices": 2, "use_distributed_sampler": False}
        method_runs.fit(model, [CASES[name].batch(ROWS, 0)], Path(folder), callbacks=[compares], **options)
        assert compares.compared


@pytest.mark.ranks
def test_sharded_methods_give_what_whole_ones_give(tmp_path: Path) -> None:
    rank_processes.start(_sharded, 2, str(tmp_path), rank_processes.free_port())
