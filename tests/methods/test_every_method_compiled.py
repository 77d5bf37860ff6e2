"""What torch.compile makes of a training method trains it as it is: Lightning's `Trainer.fit(torch.compile(model))`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch
from method_cases import CASES, ROWS

from lightspan.callbacks.resilience.random_state import RandomState

STEPS = 2


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses(name: str, folder: Path, **compiled: Any) -> list[float]:
    """Of a few steps; of the method as it is without settings of `torch.compile`."""
    model, batches = CASES[name].make(), [CASES[name].batch(ROWS, seed) for seed in range(STEPS)]
    model = torch.compile(model, **compiled) if compiled else model
    return method_runs.fit(model, batches, folder, callbacks=[RandomState(0)])


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_method_has_the_losses_of_the_method(name: str, tmp_path: Path) -> None:
    found = losses(name, tmp_path, backend="eager")
    assert len(found) == STEPS
    assert found == pytest.approx(losses(name, tmp_path), rel=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["contrastive.simclr", "distillation.dino", "masked.mae"])
def test_so_do_graphs_with_their_backward_pass(name: str, tmp_path: Path) -> None:
    assert losses(name, tmp_path, backend="aot_eager") == pytest.approx(losses(name, tmp_path), rel=1e-5)


@pytest.mark.runs
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's own backend needs one for C++")
def test_so_do_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    name = "contrastive.simclr"
    assert losses(name, tmp_path, backend="inductor") == pytest.approx(losses(name, tmp_path), rel=1e-4)


def test_a_compiled_step_without_a_trainer_gives_the_loss_too() -> None:
    case = CASES["contrastive.vicreg"]
    model, batch = case.make(), case.batch(ROWS, 0)
    expected = model.training_step(batch, 0)
    torch.testing.assert_close(torch.compile(model.training_step, backend="eager")(batch, 0), expected)
