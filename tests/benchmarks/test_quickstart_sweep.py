"""The search behind the quickstart's rates: its record is that of the search that would be made now."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lightspan.cli.config.resolve import resolve
from lightspan.cli.studies import queue

FILE = Path(__file__).parents[2] / "benchmarks" / "quickstart_sweep.py"
spec = importlib.util.spec_from_file_location("quickstart_sweep", FILE)
assert spec is not None
assert spec.loader is not None
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)


@pytest.mark.parametrize("name", list(sweep.RECIPES))
def test_the_recorded_search_ends_at_the_rates_of_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point that the search asks for is in the results: none would be trained."""
    monkeypatch.setattr(sweep, "online_loss", None)
    config = resolve(sweep.RECIPES[name]).config["model"]["init_args"]
    assert sweep.search(name) == (config["optimizer"]["init_args"]["lr"], config["groups"]["other_lr"])


def test_a_point_is_one_run_judged_by_the_last_fifth_of_its_training_losses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[tuple[str, ...]] = []

    def run_side_by_side(tasks: Any, workers: int, ended: Any, look: Any) -> None:
        for task in tasks:
            commands.append(task.command)
            task.log.parent.mkdir()
            task.log.write_text("")
            rows = [{"step": step, "train/loss_nats": float(step)} for step in range(10)]
            rows.insert(5, {"step": 5, "lr/matrices": 1.0})
            (task.log.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            ended(task, 0)

    monkeypatch.setattr(queue, "run_side_by_side", run_side_by_side)
    assert sweep.online_loss("lowrank", (5e-3, 6e-3), runs=tmp_path) == (8 + 9) / 2
    (command,) = commands
    assert command[3:5] == ("fit", "language/quickstart_lowrank")
    assert command[-1] == str(tmp_path / "lowrank-lr0.005-other0.006")
    assert set(command) >= {"seed_everything=100", "data.init_args.seed=100", "trainer.limit_val_batches=0"}
    assert resolve("language/quickstart_lowrank", flags=[word for word in command if "=" in word])
