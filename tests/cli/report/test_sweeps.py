"""A sweep in the report: runs by their settings, heat maps with the best in each cell, slices, and what is missing."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lightspan.cli.report.shown import shown
from lightspan.cli.studies.sweeps.files import Sweep, write
from lightspan.cli.studies.sweeps.points import Choices, Range
from lightspan.cli.studies.sweeps.ranking import by_point, ranked
from lightspan.cli.studies.sweeps.trials import TrialQueue
from lightspan.core.errors import UserError


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
    assert cells(page)[0] == ["0.2595 ± 0.00071", "0.1345 ± 0.00071"]
    assert len(re.findall(r'<td class="best" style="--share:50%">0\.1255 ± 0\.00071</td>', page)) == 1
    for chart in ("val/loss by lr", "val/loss by rank"):
        assert f"<b>{chart}</b>" in page


def test_a_report_its_sweep_and_its_search_count_the_same_runs_with_the_same_values(tmp_path: Path) -> None:
    """Shorter runs count for their own last value; what failed, goes on or diverged for nothing, in all three."""
    folder = tmp_path / "s"
    sweep = Sweep("r", (), {"k": Choices(tuple("abcdef"))}, metric="val/loss", seeds=(0, 1)).planned()
    write(folder, sweep)
    logs = {  # of both seeds: what was logged, and the mark of its end
        "a": [((9.0, 4.0, 1.0), "done"), ((9.0, 2.0), "done")],  # stopped early, at its own last value
        "b": [((9.0, 0.1), "done"), ((9.0, 0.1), "failed")],
        "c": [((9.0, 3.0), "done"), ((9.0, 3.5), "done")],
        "d": [((9.0, 0.0), "stopped"), ((0.0, 0.0), "failed")],
        "e": [((9.0, 0.2), "done"), ((9.0, None), "done")],
        "f": [((9.0, 0.3), "done"), ((), "")],  # not started
    }
    for trial in sweep.trials:
        losses, end = logs[trial.values["k"]][trial.seed or 0]
        if not end:
            continue
        run = folder / trial.run
        run.mkdir()
        lines = [{"step": at, "time_s": 0.0, "val/loss": value} for at, value in enumerate(losses)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "resolved.yaml").write_text(json.dumps({"seed_everything": trial.seed, "k": trial.values["k"]}))
        (run / "summary.json").write_text(json.dumps({"finished": end == "done"}))
        if end == "failed":
            (run / "failed.txt").write_text("an error")
    expected = [("a", 1.5), ("c", 3.25), ("b", 0.1), ("e", 0.2), ("f", 0.3), ("d", None)]

    def as_pairs(found: list[tuple[str, float]]) -> list[tuple[str, float | None]]:
        return [(name, None if math.isnan(value) else value) for name, value in found]

    assert as_pairs([(point["k"], one.mean) for point, one in ranked(sweep, folder, "val/loss")]) == expected
    ranking = shown([folder]).ranking()
    assert ranking is not None
    assert as_pairs([(place.run.config["k"], place.value) for place in ranking.places]) == expected
    assert [place.text() for place in ranking.places[1:4]] == [
        "3.25 ± 0.35",
        "0.1 (1 of 2 seeds)",
        "0.2 (1 of 2 seeds)",
    ]
    queue = TrialQueue(sweep, folder, retry_failed=False)
    known = [queue._result(trials) for trials in by_point(sweep)]
    counting = [(name, value) for name, value in sorted(expected) if name in "ac"]
    assert [(point["k"], value) for point, value in known if value is not None and value == value] == counting
    alone = shown([folder], folds=False).ranking()
    assert alone is not None
    assert [place.value for place in alone.places[:7]] == [0.1, 0.2, 0.3, 1.0, 2.0, 3.0, 3.5]
    assert {place.text() for place in alone.places[7:]} == {
        "0.1, failed",
        "0, preempted",
        "0, failed",
        "—",
    }


def test_equal_values_share_their_place_and_their_green(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", seeds=None)
    losses = (2.0, 1.0, 1.0, 3.0, 3.0, None)
    for trial, value in zip(sweep.trials, losses, strict=True):
        row = {"step": 0, "time_s": 0.0, "val/loss": value}
        (tmp_path / "s" / trial.run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = shown([tmp_path / "s"]).page()
    heat, rank = (page.split(f'<table class="{name}">')[1].split("</table>")[0] for name in ("heat", "rank"))
    found = re.findall(r'<td( class="best")? style="--share:(\d+)%">(.*?)</td>', heat)
    assert found == [
        ("", "30", "2"),
        (' class="best"', "50", "1"),
        (' class="best"', "50", "1"),
        ("", "20", "3"),
        ("", "20", "3"),
        ("", "0", "—"),
    ]
    assert re.findall(r"<tr><td>(\d*)</td>", rank) == ["1", "1", "3", "4", "4", ""]
    assert rank.count('class="best"') == 2


def test_runs_that_go_on_are_no_values_that_cannot_be_drawn(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", seeds=None)
    (tmp_path / "s" / sweep.trials[0].run / "summary.json").write_text('{"finished": false}')
    page = shown([tmp_path / "s"]).page()
    assert page.count("1 of 6 runs have no value that counts") == 2  # in the chart of each key
    assert "not finite" not in page


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
    assert cells(page) == [["0.259", "0.134"], ["", ""], ["0.34", "0.215"]]
    with pytest.raises(UserError, match="is not a run folder"):
        shown([tmp_path / "s" / sweep.trials[2].run])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "one"])
def test_a_trial_that_is_a_link_out_of_its_sweep_is_not_read(tmp_path: Path, whole: bool) -> None:
    sweep = make_sweep(tmp_path / "s", seeds=None)
    run = tmp_path / "s" / sweep.trials[0].run
    run.rename(tmp_path / "elsewhere")
    run.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{sweep.trials[0].run} is a link that leads out of its sweep"):
        shown([tmp_path / "s" if whole else run])
    run.unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "s" / "inside")
    run.symlink_to("inside")
    assert len(shown([tmp_path / "s"]).runs) == 6


def test_the_file_of_a_sweep_that_is_a_link_out_of_it_is_not_read(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", seeds=None)
    (tmp_path / "s" / "sweep.json").rename(tmp_path / "elsewhere")
    (tmp_path / "s" / "sweep.json").symlink_to(tmp_path / "elsewhere")
    for folder in (tmp_path / "s", tmp_path / "s" / sweep.trials[0].run):
        with pytest.raises(UserError, match=r"sweep.json is a link that leads out of its sweep"):
            shown([folder])


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
