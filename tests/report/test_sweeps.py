"""A sweep in the report: runs by their settings, heat maps with the best in each cell, slices, and what is missing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightspan.errors import UserError
from lightspan.report.shown import shown
from lightspan.sweeps.files import Sweep, write
from lightspan.sweeps.points import Choices, Range


def loss(values: dict[str, Any], seed: int | None) -> float:
    return abs(values["model.lr"] - 0.01) + 1 / values["model.rank"] + 0.001 * (seed or 0)


def make_sweep(folder: Path, seeds: tuple[int, ...] | None = (0, 1), without: tuple[int, ...] = ()) -> Sweep:
    keys = {"model.lr": Range(1e-3, 1e-1, True, 3), "model.rank": Choices((4, 8))}
    sweep = Sweep("family/name", (), keys, metric="val/loss", seeds=seeds).planned()
    write(folder, sweep)
    for at, trial in enumerate(sweep.trials):
        if at in without:
            continue
        run = folder / trial.run
        run.mkdir()
        row = {"step": 0, "time_s": 0.0, "val/loss": loss(trial.values, trial.seed)}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        model = {key.removeprefix("model."): value for key, value in trial.values.items()}
        (run / "resolved.yaml").write_text(json.dumps({"seed_everything": trial.seed, "model": model}))
    return sweep


def cells(page: str) -> list[list[str]]:
    """The texts of the first heat map, row by row."""
    table = page.split('<table class="heat">')[1].split("</table>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]


def test_a_sweep_is_named_as_a_whole_and_its_points_by_their_settings(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s")
    found = shown([tmp_path / "s"])
    assert len(found.runs) == 6
    assert found.runs[0].name == "lr=0.001, rank=4 (2 seeds)"
    assert (found.metric, found.mode) == ("val/loss", "min")
    page = found.page()
    assert "grid of lr = log(0.001,0.1,3), rank = 4,8; seeds 0, 1" in page
    assert cells(page)[0] == ["0.2595 ± 0.0007", "0.1345 ± 0.0007"]
    assert len(re.findall(r'<td class="best" style="--share:50%">0\.1255 ± 0\.0007</td>', page)) == 1
    for chart in ("val/loss by lr", "val/loss by rank"):
        assert f"<b>{chart}</b>" in page


def test_before_a_sweep_has_logged_its_metric_its_report_shows_what_there_is(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    for trial in sweep.trials:
        row = {"step": 0, "time_s": 0.0, "train/loss": 1.0}
        (tmp_path / "s" / trial.run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    found = shown([tmp_path / "s"])
    assert found.metric is None
    assert "<b>train/loss</b>" in found.page()


def test_trials_named_one_by_one_belong_to_their_sweep_once(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    folders = [tmp_path / "s" / trial.run for trial in sweep.trials]
    whole = shown([tmp_path / "s"]).page()
    assert cells(shown(folders).page()) == cells(whole)
    assert len(shown([folders[0], tmp_path / "s", folders[0]]).runs) == 6
    assert len(shown(folders, folds=False).runs) == 12


def test_trials_without_figures_are_counted_and_leave_their_cells_empty(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", seeds=None, without=(2, 3))
    (tmp_path / "s" / sweep.trials[2].run).mkdir()
    (tmp_path / "s" / sweep.trials[2].run / "failed.txt").write_text("loss is NaN")
    page = shown([tmp_path / "s"]).page()
    assert f"2 of 6 runs have no figures: 1 failed, 1 unstarted ({sweep.trials[2].run})." in page
    assert cells(page) == [["0.2590", "0.1340"], ["", ""], ["0.3400", "0.2150"]]
    with pytest.raises(UserError, match="is not a run folder"):
        shown([tmp_path / "s" / sweep.trials[2].run])


def test_a_sweep_without_any_figures_is_refused_and_says_what_became_of_its_runs(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", without=tuple(range(12)))
    with pytest.raises(UserError, match=r"no run of the sweep .*/s has figures yet: 12 unstarted"):
        shown([tmp_path / "s"])


def test_a_sweep_over_seeds_alone_is_one_run(tmp_path: Path) -> None:
    sweep = Sweep("family/name", (), {}, seeds=(0, 1, 2)).planned()
    write(tmp_path / "s", sweep)
    for trial in sweep.trials:
        (tmp_path / "s" / trial.run).mkdir()
        (tmp_path / "s" / trial.run / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
        (tmp_path / "s" / trial.run / "resolved.yaml").write_text(f"seed_everything: {trial.seed}")
    found = shown([tmp_path / "s"])
    assert [run.name for run in found.runs] == ["family/name (3 seeds)"]
    assert "Sweep of" not in found.page()


def test_hostile_settings_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    sweep = Sweep(evil, (), {"a": Choices((evil, "b")), "c": Choices((1, 2))}, metric="val/loss").planned()
    write(tmp_path / "s", sweep)
    for trial in sweep.trials:
        (tmp_path / "s" / trial.run).mkdir()
        (tmp_path / "s" / trial.run / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
    page = shown([tmp_path / "s"]).page()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
