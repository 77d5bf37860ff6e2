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


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(name: str, folder: Path, **compiled: Any) -> dict[str, torch.Tensor]:
    """The loss of a step and the weights after it; of the method as it is without settings of `torch.compile`."""
    model = CASES[name].make()
    fitted = torch.compile(model, **compiled) if compiled else model
    (loss,) = method_runs.fit(fitted, [CASES[name].batch(ROWS, 0)], folder, callbacks=[RandomState(0)])
    return model.state_dict() | {"loss": torch.tensor(loss)}


@pytest.mark.runs
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.smoke] * (name == "contrastive.simclr")) for name in CASES]
)
def test_a_compiled_method_has_the_loss_of_the_method_and_its_weights_after_a_step(name: str, tmp_path: Path) -> None:
    torch.testing.assert_close(trained(name, tmp_path, backend="eager"), trained(name, tmp_path))


@pytest.mark.runs
@pytest.mark.parametrize("name", ["contrastive.simclr", "distillation.dino", "masked.mae"])
def test_so_do_graphs_with_their_backward_pass(name: str, tmp_path: Path) -> None:
    torch.testing.assert_close(trained(name, tmp_path, backend="aot_eager"), trained(name, tmp_path))


@pytest.mark.runs
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's own backend needs one for C++")
def test_so_do_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    expected = trained("contrastive.simclr", tmp_path)
    found = trained("contrastive.simclr", tmp_path, backend="inductor")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_without_a_trainer_gives_the_loss_too() -> None:
    case = CASES["contrastive.vicreg"]
    model, batch = case.make(), case.batch(ROWS, 0)
    expected = model.training_step(batch, 0)
    torch.testing.assert_close(torch.compile(model.training_step, backend="eager")(batch, 0), expected)
