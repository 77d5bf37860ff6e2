"""Runs that differ by their seed alone become one, with the mean and the deviation of what they logged."""

import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from run_folder_fixtures import MakeRun

from lightspan.cli.report import fold as folding
from lightspan.cli.report import runs as reading
from lightspan.cli.report.compare import compare
from lightspan.cli.report.fold import fold
from lightspan.cli.report.page import BEST, MOST_DRAWN, render
from lightspan.cli.report.ranking import ranked, ranking_table
from lightspan.cli.report.runs import Run, load_run, load_runs
from lightspan.cli.report.sections import sections
from lightspan.core.errors import UserError


def seeded(seed: Any, lr: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"about": {"title": f"seed {seed}"}, "seed_everything": seed, "model": {"lr": lr, **more}}


def values(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": step, "time_s": float(step), "val/loss": loss} for step, loss in enumerate(losses)]


def made(make_run: MakeRun, *runs: dict[str, Any]) -> list[Run]:
    return load_runs([make_run(f"r-{at}", **run) for at, run in enumerate(runs)])


def test_means_and_deviations_are_those_of_the_values_at_shared_steps(make_run: MakeRun) -> None:
    logs = [(3.0, 1.0, 0.5), (5.0, 2.0), (4.0, 6.0, 0.1)]
    runs = made(make_run, *({"rows": values(*log), "resolved": seeded(at)} for at, log in enumerate(logs)))
    (folded,) = fold(runs)
    assert folded.name == "r (3 seeds)"
    assert folded.members == tuple(runs)
    points = folded.points("val/loss")
    assert [point.step for point in points] == [0, 1]
    assert [point.value for point in points] == [4.0, 3.0]
    assert [point.spread for point in points] == [statistics.stdev([3, 5, 4]), statistics.stdev([1, 2, 6])]
    assert folded.config["seed_everything"] == "0, 1, 2"


def test_summaries_are_averaged_except_for_what_all_share(make_run: MakeRun) -> None:
    summaries = [
        {"val_loss": 1.0, "parameters": 10, "finished": True, "only": 1.0},
        {"val_loss": 2.0, "parameters": 10, "finished": False, "nan": 2.0},
    ]
    (folded,) = fold(made(make_run, *({"summary": one, "resolved": seeded(at)} for at, one in enumerate(summaries))))
    assert folded.summary == {"val_loss": 1.5, "parameters": 10, "finished": False}
    assert folded.spread == {"val_loss": pytest.approx(math.sqrt(0.5))}
    cells = {row.figure.key: row.cells[0].text for row in compare([folded])}
    assert cells["val_loss"] == "1.5 ± 0.71"
    assert cells["parameters"] == "10"


def test_a_seed_that_diverged_leaves_no_mean(make_run: MakeRun) -> None:
    logs = [(1.0, 2.0), (2.0, None)]
    (folded,) = fold(made(make_run, *({"rows": values(*log), "resolved": seeded(at)} for at, log in enumerate(logs))))
    points = folded.points("val/loss")
    assert points[0].value == 1.5
    assert math.isnan(points[1].value)
    assert points[1].spread is None


@pytest.mark.parametrize(
    ("configs", "sizes"),
    [
        ([seeded(0), seeded(1), seeded(2, lr=0.2), seeded(3, lr=0.2)], [2, 2]),
        ([seeded(0), seeded(0)], [1, 1]),  # the same draw twice
        ([seeded(0), seeded(1), seeded(0), seeded(1)], [2, 2]),
        ([seeded(0), seeded(1, extra=None)], [1, 1]),
        ([{"model": {"lr": 1}}, {"model": {"lr": 1}}], [1, 1]),  # without seeds nobody knows
        ([seeded(0, parts=[{"seed": 4}]), seeded(0, parts=[{"seed": 5}])], [2]),
        ([None, None], [1, 1]),
    ],
)
def test_only_runs_that_differ_by_their_seed_alone_are_folded(
    make_run: MakeRun, configs: list[dict[str, Any] | None], sizes: list[int]
) -> None:
    folded = fold(made(make_run, *({"resolved": config} for config in configs)))
    assert [max(1, len(run.members)) for run in folded] == sizes
    assert len({run.name for run in folded}) == len(folded)


def test_a_configuration_is_taken_apart_once_however_many_runs_there_are(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = made(make_run, *({"resolved": seeded(at % 5, lr=0.1 * (at % 2))} for at in range(20)))
    taken: list[Any] = []
    original = folding._divided
    monkeypatch.setattr(folding, "_divided", lambda config: (taken.append(1), original(config))[1])
    assert [max(1, len(run.members)) for run in fold(runs)] == [5, 5, 5, 5]
    assert len(taken) == len(runs)


def test_a_group_without_a_name_of_its_own_has_that_of_its_first_run(make_run: MakeRun) -> None:
    folders = [make_run(name, resolved=seeded(at)) for at, name in enumerate(("2026-01-01", "mine"))]
    assert [run.name for run in fold(load_runs(folders))] == ["2026-01-01 (2 seeds)"]


def test_curves_of_folded_runs_have_a_surface(make_run: MakeRun) -> None:
    runs = made(make_run, *({"rows": values(3.0 + at, 1.0 + at), "resolved": seeded(at)} for at in range(3)))
    chart = sections(fold(runs))[0].charts[0]
    assert chart.curves[0].band == [(0.0, 3.0, 5.0), (1.0, 1.0, 3.0)]
    assert "one standard deviation over seeds" in chart.note
    page = render(fold(runs), "title")
    assert 'class="band"' in page
    assert "the runs behind the means" in page
    assert all(run.name in page for run in runs)
    assert 'class="band"' not in render(runs, "title")


def test_a_ranking_puts_the_best_first_and_what_diverged_last(make_run: MakeRun) -> None:
    losses = (2.0, None, 1.0, 3.0)
    runs = made(
        make_run, *({"rows": values(9.0, loss), "resolved": seeded(0, lr=at)} for at, loss in enumerate(losses))
    )
    found = ranked(runs)
    assert found is not None
    assert (found.metric, found.mode) == ("val/loss", "min")
    assert [place.run.name for place in found.places] == ["r-2", "r-0", "r-3", "r-1"]
    flipped = ranked(runs, "val/loss", "max")
    assert flipped is not None
    assert [place.run.name for place in flipped.places] == ["r-3", "r-0", "r-2", "r-1"]
    table = ranking_table(found)
    assert '<th scope="col">lr</th>' in table
    assert table.count('class="best"') == 1
    with pytest.raises(UserError, match="--metric val/los: no run logged it; they logged val/loss"):
        ranked(runs, "val/los")


def test_a_ranking_names_classes_briefly_and_shows_the_value_before_what_differs(make_run: MakeRun) -> None:
    paths = ("lightspan.optim.muon.Muon", "lightspan.optim.low_rank.presets.Fira", "torch.optim.Muon")
    optimizers = ({"class_path": path, "init_args": {"lr": at / 2}} for at, path in enumerate(paths))
    resolved = ({"model": {"init_args": {"optimizer": one}}} for one in optimizers)
    runs = made(make_run, *({"rows": values(9.0, at), "resolved": one} for at, one in enumerate(resolved)))
    found = ranked(runs)
    assert found is not None
    table = ranking_table(found)
    heads = ["", "run", "val/loss", "optimizer", "lr", "steps", "seconds"]
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == heads
    shown = re.findall(r'<td class="setting"( title="[\w.]+")?>(.*?)</td>', table)
    assert [text for _, text in shown] == ["muon.Muon", "0.0", "Fira", "0.5", "optim.Muon", "1.0"]
    assert [title for title, _ in shown[::2]] == [f' title="{path}"' for path in paths]


def test_a_metric_without_a_direction_needs_one(make_run: MakeRun) -> None:
    runs = made(make_run, {"rows": [{"step": 0, "time_s": 0.0, "width": 1.0}]})
    assert ranked(runs) is None
    with pytest.raises(UserError, match="--metric width: its name does not tell whether low or high is good"):
        ranked(runs, "width")
    assert ranked(runs, "width", "max") is not None


def test_of_many_runs_the_page_draws_the_best_and_ranks_all(make_run: MakeRun) -> None:
    count = MOST_DRAWN + 1
    runs = made(make_run, *({"rows": values(9.0, 20.0 - at), "resolved": seeded(0, lr=at)} for at in range(count)))
    page = render(runs, "many")
    assert f"The ranking has all {count} runs; below it are the {BEST} best." in page
    legend = page.split('class="legend"')[1].split("</div>")[0]
    assert [f"r-{at}<" in legend for at in range(count)] == [False] * (count - BEST) + [True] * BEST
    assert all(f'<th scope="row">r-{at}</th>' in page for at in range(count))


def test_settings_and_provenance_that_all_runs_share_are_folded_away(make_run: MakeRun) -> None:
    runs = made(make_run, *({"provenance": {"python": "3.11", "argv": [str(at)]}} for at in range(2)))
    page = render(runs, "two")
    shown, hidden = page.split("<h2>Provenance</h2>")[1].split("1 entries that all runs share", 1)
    assert "argv" in shown
    assert "python" not in shown
    assert "python" in hidden


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "summary.json", "samples.jsonl", "provenance.json", "pictures", "failed.txt"]
)
def test_a_link_out_of_a_run_is_not_read(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    run = make_run("a", provenance={"argv": []}, samples=[])
    (run / "pictures").mkdir()
    (run / "failed.txt").touch()
    (run / name).rename(tmp_path / "outside")
    (run / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link that leads out of its run folder"):
        load_run(run, "a")
    (run / name).unlink()
    (run / name).symlink_to(name)
    with pytest.raises(UserError, match=r"leads nowhere|metrics"):
        load_run(run, "a")
    (run / name).unlink()
    (tmp_path / "outside").rename(run / "inside")
    (run / name).symlink_to("inside")
    load_run(run, "a")


def test_numbers_whose_squares_are_beyond_floats_have_no_mean(make_run: MakeRun) -> None:
    runs = made(make_run, *({"summary": {"a": 1e308 / at}, "resolved": seeded(at)} for at in (1, 2)))
    (folded,) = fold(runs)
    assert folded.summary == {"a": None}


def test_of_files_that_are_too_large_the_end_is_shown_or_nothing_and_the_page_says_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [{"step": at, "text": f"sample {at}"} for at in range(100)]
    folder = make_run("a", rows=values(*range(100)), samples=samples, provenance={"argv": ["x" * 500]})
    (folder / "pictures").mkdir()
    for name, size in (("big-1.png", 400), ("map-1.png", 10_000), ("map-2.png", 90), ("one.png", 90), ("two.png", 90)):
        (folder / "pictures" / name).write_bytes(reading.PNG_MARK + b"x" * (size - 8))
    limits = {"METRICS": 1000, "SAMPLES": 200, "MAPPING": 300, "PICTURE": 100, "PICTURES": 200}
    for name, most in limits.items():
        monkeypatch.setattr(reading, f"MOST_{name}_BYTES", most)
    (run,) = fold([load_run(folder, "a<b")])
    assert [row["step"] for row in run.rows] == list(range(100 - len(run.rows), 100))
    assert 10 < len(run.rows) < 30
    assert run.samples == samples[-len(run.samples) :]
    assert (run.provenance, sorted(run.pictures)) == ({}, ["map", "one"])
    page, size = render([run], "title"), (folder / "metrics.jsonl").stat().st_size
    for said in (
        f"a&lt;b: metrics.jsonl has {size:,} bytes, of which the last 1,000 are shown.",
        "bytes, of which the last 200 are shown.",
        "provenance.json is left out: it has more than 300 bytes.",
        "big-1.png is left out: pictures have a limit of 100 bytes for one and 200 for all.",
        "two.png is left out: pictures have a limit of 100 bytes for one and 200 for all.",
    ):
        assert f"{said}</p>" in page, said
    assert "a&lt;b" in page
    assert len(run.remarks) == 5
