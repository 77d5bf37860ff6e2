"""Batches of a single row: a method whose loss then has no gradient says so, and is not trained on data of such."""

from typing import Any

import pytest
import torch
from method_cases import CASES

from lightspan.cli import main


def gradient(name: str, rows: slice) -> float:
    """Largest entry of the gradient of a first step on these of two rows."""
    model: Any = CASES[name].make()
    model.log = model.log_dict = lambda *_, **__: None
    batch = CASES[name].batch(2, 0)
    part = {key: [one[rows] for one in value] if key == "views" else value[rows] for key, value in batch.items()}
    found = model.training_step(part, 0)
    loss = found if torch.is_tensor(found) else found["loss"]
    loss.backward()
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


BOTH, EACH = slice(2), (slice(1), slice(1, 2))
"""In some cases one of the two rows is blank, or nothing of it is hidden."""


def test_methods_without_a_gradient_for_one_row_ask_for_two() -> None:
    asking = [name for name, case in CASES.items() if case.make().least_rows > 1]
    others = [name for name, case in CASES.items() if name not in asking and case.refuses_one_row is None]
    assert "contrastive.simclr" in asking
    alone = {name: max(gradient(name, row) for row in EACH) for name in others}
    assert [name for name, largest in alone.items() if largest <= 1e-6 < gradient(name, BOTH)] == []
    assert [name for name in asking if gradient(name, BOTH) <= 1e-6] == []


def test_data_of_one_row_are_refused_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["fit", "contrastive/simclr", "--dry-run"]
    assert main([*line, "data.init_args.batch_size=1"]) == 2
    assert "data.init_args.batch_size=1 leaves SimCLR nothing to tell apart" in capsys.readouterr().err
    assert main([*line, "data.init_args.batch_size=4", "trainer.accumulate_grad_batches=4"]) == 2
    assert "set batch_size to 8 or more" in capsys.readouterr().err
