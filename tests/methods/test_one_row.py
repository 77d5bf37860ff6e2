"""Batches of a single row: a method whose loss then has no gradient says so, and is not trained on data of such."""

from typing import Any

import pytest
import torch
from method_cases import CASES, ROWS
from method_runs import rows_of

from lightspan.cli.main import main


def gradient(name: str, *rows: int) -> float:
    """Largest entry of the gradient of a first step on these rows of a batch."""
    model: Any = CASES[name].make()
    model.log = model.log_dict = lambda *_, **__: None
    given = CASES[name].batch(ROWS, 0)
    found = model.training_step(rows_of(given, slice(rows[0], rows[-1] + 1)), 0)
    loss = found if torch.is_tensor(found) else found["loss"]
    loss.backward()
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


@pytest.mark.sweep
def test_methods_without_a_gradient_for_any_row_alone_ask_for_two() -> None:
    asking = [name for name, case in CASES.items() if case.make().least_rows > 1]
    others = [name for name, case in CASES.items() if name not in asking and case.refuses_one_row is None]
    assert "contrastive.simclr" in asking
    others = [name for name in others if gradient(name, *range(ROWS)) > 1e-7]  # not for a bank that is empty at first
    silent = [name for name in others if all(gradient(name, row) <= 1e-7 for row in range(ROWS))]
    assert silent == [], "these need least_rows = 2"
    assert [name for name in asking if gradient(name, *range(ROWS)) <= 1e-7] == []


def test_data_of_one_row_are_refused_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["fit", "contrastive/simclr", "--dry-run"]
    assert main([*line, "data.init_args.batch_size=1"]) == 2
    assert "data.init_args.batch_size=1 leaves SimCLR nothing to tell apart" in capsys.readouterr().err
    assert main([*line, "data.init_args.batch_size=4", "trainer.accumulate_grad_batches=4"]) == 2
    assert "set batch_size to 8 or more" in capsys.readouterr().err
