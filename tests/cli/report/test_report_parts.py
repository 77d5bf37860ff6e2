"""What the report computes before it draws: comparisons, curves, axes, names."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightspan.cli.report.chart import Chart, ChartLine, draw
from lightspan.cli.report.compare import caution, compare, differences, headline, number
from lightspan.cli.report.curves import smooth, thin, ticks, window
from lightspan.cli.report.page import render
from lightspan.cli.report.runs import load_runs, unique_names
from lightspan.cli.report.sections import MOST_CHARTS, group_of, sections, unit_of

MakeRun = Callable[..., Path]
VALUES = st.floats(-1e6, 1e6)


def cells(make_run: MakeRun, *summaries: dict[str, object]) -> dict[str, list[tuple[str, str, bool]]]:
    runs = load_runs(
        [make_run(f"run{at}", summary={**summary, "finished": True}) for at, summary in enumerate(summaries)]
    )
    return {row.figure.key: [(cell.text, cell.relative, cell.best) for cell in row.cells] for row in compare(runs)}


def test_losses_compare_by_difference_and_costs_by_ratio(make_run: MakeRun) -> None:
    found = cells(
        make_run,
        {"val_loss_nats": 1.5, "optimizer_state_mib": 16.0, "parameters": 2_098_432},
        {"val_loss_nats": 1.4875, "optimizer_state_mib": 4.0, "parameters": 2_098_432},
    )
    assert found["val_loss_nats"] == [("1.5", "", False), ("1.4875", "−0.0125", True)]  # noqa: RUF001
    assert found["optimizer_state_mib"] == [("16", "", False), ("4", "×0.25", True)]  # noqa: RUF001
    assert found["parameters"] == [("2\u202f098\u202f432", "", False), ("2\u202f098\u202f432", "", False)]


def test_small_and_large_scores_keep_their_digits(make_run: MakeRun) -> None:
    found = cells(make_run, {"val_mse": 1.0e-5, "val_bits": 98765.4}, {"val_mse": 1.23456e-5, "val_bits": 4321.25})
    assert found["val_mse"] == [("1.0000e-05", "", True), ("1.2346e-05", "+2.35e-06", False)]
    assert found["val_bits"] == [("98\u202f765", "", False), ("4\u202f321.2", "\N{MINUS SIGN}94\u202f444", True)]


def test_higher_accuracy_is_better_and_lower_error_is_better(make_run: MakeRun) -> None:
    found = cells(make_run, {"val_acc": 0.9, "val_error": 0.1}, {"val_acc": 0.8, "val_error": 0.2})
    assert [best for _, _, best in found["val_acc"]] == [True, False]
    assert [best for _, _, best in found["val_error"]] == [True, False]


def test_equal_runs_have_no_best_and_a_missing_figure_is_a_dash(make_run: MakeRun) -> None:
    found = cells(make_run, {"val_loss_nats": 1.0, "seconds": 3.0}, {"val_loss_nats": 1.0})
    assert [best for _, _, best in found["val_loss_nats"]] == [False, False]
    assert found["seconds"] == [("3", "", False), ("—", "", False)]


def test_a_diverged_run_is_never_the_best(make_run: MakeRun) -> None:
    found = cells(make_run, {"val_loss_nats": 2.0}, {"val_loss_nats": None}, {"val_loss_nats": 3.0})
    assert [best for _, _, best in found["val_loss_nats"]] == [True, False, False]


def test_headline_tells_every_later_run_against_the_first(make_run: MakeRun) -> None:
    states = (16.0, 4.0)
    runs = load_runs(
        [
            make_run(f"r{s:g}", summary={"val_loss_nats": 1.0, "optimizer_state_mib": s, "finished": True})
            for s in states
        ]
    )
    assert headline(runs) == ["r4 against r16: +0 nats validation loss, ×0.25 optimiser state"]  # noqa: RUF001


def data(name: str, **settings: object) -> dict[str, object]:
    return {"data": {"class_path": name, "init_args": settings}}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"resolved": data("a.Digits", size=1)}, {"resolved": data("a.Digits", size=1, batch_size=3)}, ""),
        ({"resolved": data("a.Digits")}, {}, ""),
        (
            {"resolved": data("a.Digits", size=1)},
            {"resolved": data("a.Shapes", size=2)},
            "they differ in data.class_path (a.Digits, a.Shapes), data.init_args.size (1, 2)",
        ),
        (
            {"resolved": data("a.Digits") | {"trainer": {"limit_val_batches": 2}}},
            {"resolved": data("a.Digits")},
            "they differ in trainer.limit_val_batches (2, —)",
        ),
        (
            {"summary": {"val_loss": 1.0}},
            {"summary": {"val_accuracy": 1.0}},
            "they have no score in common (r0 has val_loss, r1 has val_accuracy)",
        ),
    ],
)
def test_runs_that_measure_other_things_are_told(
    make_run: MakeRun, first: dict[str, object], second: dict[str, object], said: str
) -> None:
    runs = load_runs([make_run(f"r{at}", **files) for at, files in enumerate((first, second))])
    assert caution(runs) == (f"The scores of these runs may not be comparable: {said}" if said else "")
    assert caution(runs[:1]) == ""


def test_differences_show_a_missing_key_and_leave_out_equal_ones() -> None:
    one, two = {"a": {"x": 1, "y": None}, "same": [1, {"z": 2}]}, {"a": {"x": 2}, "same": [1, {"z": 2}]}
    assert differences([one, two]) == [("a.x", ["1", "2"]), ("a.y", ["null", "—"])]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.0, "12"),
        (1234567, "1\u202f234\u202f567"),
        (5.90049, "5.9"),
        (0.00012341, "1.234e-04"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert number(value) == text


def test_smoothing_by_hand() -> None:
    # keep = 1/2: 4; (2 + 1) / (1/2 + 1) = 2; (1.5 + 1) / (0.75 + 1)
    assert [y for _, y in smooth([(0, 4), (1, 1), (2, 1)], span=2)] == [4, pytest.approx(2), pytest.approx(10 / 7)]


@given(st.lists(VALUES, min_size=1, max_size=300), st.floats(1, 50))
def test_smoothing_stays_between_the_extremes_and_span_one_changes_nothing(ys: list[float], span: float) -> None:
    points = [(float(x), y) for x, y in enumerate(ys)]
    slack = 1e-9 * max(map(abs, ys))
    assert all(min(ys) - slack <= y <= max(ys) + slack for _, y in smooth(points, span))
    assert smooth(points, 1) == points


@given(st.lists(VALUES, min_size=1, max_size=2000), st.integers(4, 100))
def test_thinning_keeps_order_and_extremes(ys: list[float], limit: int) -> None:
    points = [(float(x), y) for x, y in enumerate(ys)]
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 2)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {min(ys), max(ys)} <= {y for _, y in kept}


@given(VALUES, st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_lie_inside_and_evenly_and_are_few(low: float, span: float, count: int) -> None:
    found = ticks(low, low + span, count)
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in found)
    assert len(found) <= count + 1
    steps = [b - a for a, b in pairwise(found)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


def test_ticks_are_round_numbers() -> None:
    assert ticks(0.3, 4.4, 4) == [2, 4]
    assert ticks(0, 400, 5) == [0, 100, 200, 300, 400]


def test_a_long_curve_with_a_steep_start_is_cut_and_the_cut_counted() -> None:
    falling = [(float(x), 10.0 if x < 5 else 1 + (100 - x) / 100) for x in range(100)]
    low, high, above, peak = window([falling])
    assert (low, above, peak) == (pytest.approx(1.01), 5, 10.0)
    assert 1.9 < high < 2.1
    assert "the axis is cut: 5 early values, up to 10, are above it" in draw(
        Chart("t", "x", "y", [ChartLine("r", 0, falling)])
    )


def test_a_short_curve_is_never_cut() -> None:
    assert window([[(0.0, 100.0), *((float(x), 1.0) for x in range(1, 20))]]) == (1.0, 100.0, 0, 100.0)


def y_ticks(svg: str) -> list[float]:
    """What stands at the left of a chart, from the floor up."""
    return [float(text) for text in re.findall(r'text-anchor="end">(-?[\d.]+)</text>', svg.partition("M58 226H428")[0])]


def test_what_is_0_throughout_is_drawn_from_0_upward_and_what_may_be_negative_around_its_value() -> None:
    def of(*values: float, **more: object) -> list[float]:
        curve = ChartLine("r", 0, [(float(at), value) for at, value in enumerate(values)])
        return y_ticks(draw(Chart("t", "x", "y", [curve], **more)))  # type: ignore[arg-type]

    assert of(0.0, 0.0, 0.0) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert of(0.0, 1e-320)[0] == 0
    assert of(0.0, 0.0, things=2)[0] == 0
    below, above = min(found := of(-2.0, -2.0)), max(found)
    assert -2.2 < below < -2 < above < -1.8
    assert min(of(3.0, 3.0)) > 2.8


def test_values_that_cannot_be_drawn_are_counted_below_the_chart() -> None:
    curve = ChartLine("r", 0, [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf)])
    assert "2 values are not finite" in draw(Chart("t", "x", "y", [curve]))
    assert "1 values are not finite or not positive" in draw(
        Chart("t", "x", "y", [ChartLine("r", 0, [(0.0, 0.0), (1.0, 1.0)])], log_y=True)
    )


@given(st.lists(st.tuples(VALUES, VALUES), max_size=30), st.booleans())
def test_any_chart_is_well_formed(points: list[tuple[float, float]], log_y: bool) -> None:
    from xml.etree import ElementTree

    svg = draw(Chart("t & u", "x", "y", [ChartLine("r", 7, points), ChartLine("empty", 1, [])], log_y=log_y))
    ElementTree.fromstring(svg)
    assert "nan" not in svg


@pytest.mark.parametrize(
    ("metric", "group", "unit"),
    [
        ("val/loss_nats", "val", "nats"),
        ("val_loss", "val", ""),
        ("lr/matrices", "lr", "rate"),
        ("lr-AdamW", "lr", "rate"),
        ("throughput/tokens_per_s", "throughput", "per second"),
        ("memory/rss_mib", "memory", "MiB"),
        ("dimension/features_two_nn", "dimension", "dimensions"),
        ("dimension/gradient_top_energy", "dimension", "share"),
        ("value/x", "other", ""),
        ("gradient_norm", "other", ""),
    ],
)
def test_metrics_are_grouped_by_their_first_word(metric: str, group: str, unit: str) -> None:
    assert (group_of(metric), unit_of(metric)) == (group, unit)


def test_figures_of_single_matrices_share_one_chart_of_last_values(make_run: MakeRun) -> None:
    names = ["dimension/gradient_effective_rank", *(f"dimension/gradient_effective_rank/{at}.weight" for at in "abc")]
    rows = [{"step": s, "time_s": 1.0 * s, **{name: s + at for at, name in enumerate(names)}} for s in (10, 20)]
    (section,) = sections(load_runs([make_run("one", rows=rows), make_run("two", rows=rows[:1])]))
    over_steps, profile = section.charts
    assert (over_steps.title, profile.title) == (names[0], f"{names[0]} by matrix")
    assert [curve.points for curve in profile.curves] == [[(0, 21), (1, 22), (2, 23)], [(0, 11), (1, 12), (2, 13)]]
    assert profile.note == "last values; 0 is a.weight, 1 is b.weight, 2 is c.weight"


def test_matrices_stand_side_by_side_at_whole_numbers_and_rounding_is_no_slope() -> None:
    points = [(0.0, 0.2), (1.0, 0.19996), (2.0, 0.2)]
    drawn = draw(Chart("density by matrix", "matrix", "share", [ChartLine("a", 0, points)], things=3))
    assert 'class="line"' not in drawn
    assert drawn.count("<circle") == 3
    assert re.findall(r'text-anchor="middle">(.*?)</text>', drawn) == ["0", "1", "2"]
    heights = [float(y) for y in re.findall(r'cy="(.*?)"', drawn)]
    assert max(heights) - min(heights) < 2  # of 264


def test_two_runs_also_get_the_difference_at_shared_steps(make_run: MakeRun) -> None:
    rows = [
        [{"step": s, "time_s": 1.0 * s, "val/loss": base + s} for s in at]
        for base, at in ((1.0, (0, 1, 2)), (1.5, (1, 2, 3)))
    ]
    runs = load_runs([make_run("a", rows=rows[0]), make_run("b", rows=rows[1])])
    charts = {chart.title: chart for chart in sections(runs)[0].charts}
    assert charts["val/loss minus that of a"].curves[0].points == [(1.0, 0.5), (2.0, 0.5)]
    assert charts["val/loss by wall time"].curves[1].points == [(1.0, 2.5), (2.0, 3.5), (3.0, 4.5)]


def test_a_spectrum_is_one_chart_by_index_and_no_curve_over_steps(make_run: MakeRun) -> None:
    rows = [{"step": s, "time_s": 0.0, "spectrum/w/10": 1.0, "spectrum/w/9": 2.0 + s, "val/x": 0.0} for s in (0, 5)]
    runs = load_runs([make_run("a", rows=rows)])
    (chart,) = next(section.charts for section in sections(runs) if section.key == "spectrum")
    assert (chart.title, chart.note, chart.log_y) == ("spectrum/w", "as logged at step 5", True)
    assert chart.curves[0].points == [(9.0, 7.0), (10.0, 1.0)]


def test_names_get_parents_until_they_differ(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("x/run", "y/run", "z")]
    assert unique_names(folders) == ["x/run", "y/run", "z"]
    assert unique_names([tmp_path / "z", tmp_path / "z"]) == ["z", "z-2"]


@given(st.lists(st.sampled_from(["a", "b", "a/a", "b/a", "a/b/a", "b/b/a"]), min_size=1, max_size=6))
def test_names_are_always_unique(paths: list[str]) -> None:
    names = unique_names([Path("/runs", path) for path in paths])
    assert len(set(names)) == len(names)


def test_rates_of_one_optimiser_lose_its_name_and_of_two_keep_it(make_run: MakeRun) -> None:
    one = make_run("a", rows=[{"step": 0, "lr-AdamW/x": 1.0, "lr-AdamW/y": 1.0}])
    two = make_run("b", rows=[{"step": 0, "lr-AdamW/x": 1.0, "lr-SGD/x": 1.0}])
    assert [run.metrics() for run in load_runs([one, two])] == [["lr/x", "lr/y"], ["lr-AdamW/x", "lr-SGD/x"]]


def test_commands_import_and_report_without_torch(make_run: MakeRun, tmp_path: Path) -> None:
    code = f"""
import argparse, sys
from lightspan.cli.commands import doctor
from lightspan.cli.commands import export
from lightspan.cli.commands import plan
from lightspan.cli.commands import report
for module in (doctor, export, plan, report):
    module.add_arguments(argparse.ArgumentParser())
heavy = {{"torch", "lightning", "numpy", "matplotlib", "rich"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
parser = argparse.ArgumentParser()
report.add_arguments(parser)
report.run(parser.parse_args([{str(make_run("a"))!r}, "--out", {str(tmp_path / "out")!r}]))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["a"]["steps"] == 50


def test_a_run_of_very_many_metrics_has_a_page_of_some(tmp_path: Path) -> None:
    count = 3 * MOST_CHARTS
    lines = [json.dumps({"step": at, "time_s": at, f"m{at}": 1.0}) for at in range(count)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    [run] = load_runs([tmp_path])
    assert len(run.metrics()) == count
    assert [point.step for point in run.points("m7")] == [7]
    [section] = sections([run])
    assert (len(section.charts), section.more) == (MOST_CHARTS, count - MOST_CHARTS)
    assert f"{count - MOST_CHARTS:,} more metrics of this kind are not drawn" in render([run], "r")
