"""Rankings are those of the last values of runs that are done, whatever else lies in their folders."""

import json
import math
from pathlib import Path

import pytest

from lightspan.cli.runs.figures import standings
from lightspan.cli.studies.sweeps.files import Sweep
from lightspan.cli.studies.sweeps.outcome import conclude
from lightspan.cli.studies.sweeps.points import Choices
from lightspan.cli.studies.sweeps.ranking import over_seeds, ranked


def finish(run: Path, *losses: float | None, finished: bool = True) -> None:
    """A run folder whose val/loss took these values."""
    run.mkdir(parents=True)
    rows = [{"step": step, "time_s": 1.0, "epoch": 0, "val/loss": loss} for step, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"finished": finished}))


def swept(folder: Path, *losses: list[float | None], seeds: int = 2) -> Sweep:
    """Points 1, 2, ... with the last loss of each of their seeds; a run without one has not started."""
    keys = {"k": Choices(tuple(range(1, len(losses) + 1)))}
    sweep = Sweep("r", (), keys, seeds=tuple(range(seeds)), metric="val/loss").planned()
    flat = [loss for point in losses for loss in [*point, *[0.0] * (seeds - len(point))]]
    given = [at < len(point) for point in losses for at in range(seeds)]
    for trial, loss, exists in zip(sweep.trials, flat, given, strict=True):
        if exists:
            finish(folder / trial.run, 9.0, loss)
    return sweep


def test_points_are_ranked_by_the_mean_over_seeds_with_their_spread(tmp_path: Path) -> None:
    sweep = swept(tmp_path, [1.0, 3.0], [0.5, 0.7], [1.5, 1.5])
    found = ranked(sweep, tmp_path, "val/loss")
    assert [values["k"] for values, _ in found] == [2, 3, 1]
    scores = found[2][1]
    assert (scores.mean, scores.spread, dict(scores.values)) == (2.0, math.sqrt(2), {0: 1.0, 1: 3.0})
    found = ranked(Sweep(**{**vars(sweep), "mode": "max"}), tmp_path, "val/loss")
    assert [values["k"] for values, _ in found] == [1, 3, 2]


def test_a_point_that_lacks_a_seed_comes_after_all_that_have_theirs(tmp_path: Path) -> None:
    sweep = swept(tmp_path, [], [0.1, None], [5.0, 6.0], [0.2])
    found = ranked(sweep, tmp_path, "val/loss")
    assert [values["k"] for values, _ in found] == [3, 2, 4, 1]
    assert [len(scores.values) for _, scores in found] == [2, 1, 1, 0]
    assert math.isnan(found[-1][1].mean)
    assert math.isnan(found[1][1].spread)


def test_points_that_are_equally_good_share_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = swept(tmp_path, [2.0], [1.0], [1.0], [], [2.0], seeds=1)
    points = [scores for _, scores in ranked(sweep, tmp_path, "val/loss")]
    assert standings(points, "min") == [1, 1, 3, 3, None]
    assert not conclude(sweep, tmp_path)
    said = capsys.readouterr().out
    assert [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")] == [
        "1",
        "1",
        "3",
        "3",
        "",
    ]
    assert "best, the first of 2 equal ones: k=2" in said


def test_a_run_that_is_not_done_counts_for_nothing(tmp_path: Path) -> None:
    sweep = swept(tmp_path, [1.0], [2.0], seeds=1)
    (tmp_path / sweep.trials[0].run / "summary.json").write_text('{"finished": false}')
    assert [values["k"] for values, _ in ranked(sweep, tmp_path, "val/loss")] == [2, 1]
    (tmp_path / sweep.trials[1].run / "failed.txt").write_text("an error")
    assert all(not scores.values for _, scores in ranked(sweep, tmp_path, "val/loss"))


def test_a_metric_that_no_run_logged_ranks_nothing(tmp_path: Path) -> None:
    sweep = swept(tmp_path, [1.0], [2.0], seeds=1)
    assert [len(scores.values) for _, scores in ranked(sweep, tmp_path, "val/f1")] == [0, 0]


def test_metrics_over_seeds(tmp_path: Path) -> None:
    sweep = Sweep("r", (), {}, seeds=(0, 1, 2)).planned()
    for trial, loss in zip(sweep.trials, (1.0, 2.0, None), strict=True):
        finish(tmp_path / trial.run, loss)
    found = over_seeds(sweep, tmp_path)
    assert list(found) == ["val/loss"]
    assert (found["val/loss"].mean, len(found["val/loss"].values), found["val/loss"].runs) == (1.5, 2, 3)
