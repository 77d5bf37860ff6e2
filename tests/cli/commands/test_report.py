"""`lightspan report`: the page holds everything that was logged, loads nothing, and says what it leaves out."""

import argparse
import json
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Callable
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from waiting import HANG_S

from lightspan.cli.commands import fit, report
from lightspan.core.errors import UserError
from lightspan.core.pixels import png_of

MakeRun = Callable[..., Path]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def run_report(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(argument) for argument in arguments]))


def page_of(tmp_path: Path, *arguments: object) -> str:
    assert run_report(*arguments, "--out", tmp_path / "out") == 0
    return (tmp_path / "out" / "report.html").read_text()


def test_every_metric_that_one_run_logged_is_on_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("a")
    second = make_run("b", rows=[{"step": 0, "time_s": 0.0, "probe/knn_acc": 0.5, "anything": 1.0, "val/new": 2.0}])
    page = page_of(tmp_path, first, second)
    for metric in ("train/loss_nats", "val/loss_nats", "val/bits_per_byte", "probe/knn_acc", "anything", "val/new"):
        assert f"<b>{metric}</b>" in page
    assert "<b>lr/matrices</b>" in page  # named without the optimiser, so that runs with different ones share a chart


def test_validation_stands_before_training_and_rates(make_run: MakeRun, tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run("a"))
    positions = [
        page.index(f"<h2>{title}</h2>") for title in ("Comparison", "Validation", "Training", "Learning rates")
    ]
    assert positions == sorted(positions)


def test_the_page_refers_to_nothing_outside_itself(make_run: MakeRun, tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run("a"), make_run("b", 0.1))
    assert not re.search(
        r"https?://|//[a-z]|url\(|@import|<script|<link|<img|<iframe|\bsrc=|\bhref=", page, re.IGNORECASE
    )
    assert "default-src 'none'" in page


def test_pictures_of_a_run_are_inside_the_page_and_nothing_else_of_the_folder_is(
    make_run: MakeRun, tmp_path: Path
) -> None:
    first, second = make_run("a"), make_run("b")
    pixel = png_of(torch.zeros(3, 1, 1))
    for run, names in ((first, ("map", "neighbours", "own-0000001", "own-0000002")), (second, ("map",))):
        (run / "pictures").mkdir()
        for name in names:
            (run / "pictures" / f"{name}.png").write_bytes(pixel)
    (first / "pictures" / "text.png").write_text("<script>")
    (first / "pictures" / "link.png").symlink_to(first / "pictures" / "map.png")
    page = page_of(tmp_path, first, second)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources == [f"data:image/png;base64,{b64encode(pixel).decode()}"] * 4
    assert page.index("training pictures whose features are nearest") < page.index("similar features close together")
    assert "<h3>own</h3>" in page
    assert "img-src data:" in page


def test_command_lines_and_earlier_starts_stand_as_they_were_typed(make_run: MakeRun, tmp_path: Path) -> None:
    argv = ["lightspan", "fit", "a/b", "--images", "my pictures"]
    earlier = [{"started": "2026-01-01", "argv": argv, "sources": {"trainer.max_steps": "a/b.yaml:3"}}]
    provenance = {"argv": argv, "earlier": earlier, "notes": ["the recipe's pictures", "another"]}
    page = unescape(page_of(tmp_path, make_run("a", provenance=provenance)))
    typed = "lightspan fit a/b --images 'my pictures'"
    for cell in (typed, f"2026-01-01: {typed}", "the recipe's pictures; another"):
        assert f"<td>{cell}</td>" in page


def test_text_from_files_cannot_become_markup(make_run: MakeRun, tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    rows = [{"step": 0, "time_s": 0.0, f"val/{evil}": 1.0, evil: 2.0}]
    files = {
        "rows": rows,
        "config": None,
        "resolved": {"about": {"title": evil}, evil: evil},
        "provenance": {"argv": [evil], evil: evil, "packages": {evil: evil}},
        "samples": [{"step": evil, "text": evil}],
        "summary": {f"val_{evil}": 1.0, "finished": True},
    }
    page = page_of(tmp_path, make_run("a", **files), make_run("b"), "--title", evil)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10


def test_control_characters_in_names_and_settings_are_shown_and_not_obeyed(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("evil\x1b[31m\u202e\a")
    page = page_of(tmp_path, run)
    assert "evil\\x1b[31m\\u202e\\x07" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)


def test_summary_beside_the_page_holds_every_runs_summary_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    page_of(tmp_path, make_run("adamw"), make_run("lowrank", 0.25))
    summaries = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: summary["val_loss_nats"] for name, summary in summaries.items()} == {"adamw": 1.5, "lowrank": 1.75}
    assert summaries["adamw"]["finished"] is True


def test_summary_stays_json_when_a_run_diverged(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", summary=None, rows=[{"step": 0, "time_s": 0.0, "val/loss_nats": None}])
    page = page_of(tmp_path, folder)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    summaries = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=refuse)
    assert summaries["a"]["val_loss_nats"] is None
    assert "1 values are not finite (NaN, infinite or beyond 1e300) and cannot be drawn" in page


def test_equal_runs_give_equal_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a")
    outputs = []
    for out in ("x", "y"):
        run_report(folder, "--out", tmp_path / out, "--png", tmp_path / out / "curves.png")
        outputs.append([(tmp_path / out / name).read_bytes() for name in ("report.html", "curves.png", "summary.json")])
    assert outputs[0] == outputs[1]


def test_a_killed_run_counts_up_to_its_last_whole_line(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", summary=None, resolved={"seed_everything": 0})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "time_s": 5.0, "val/loss')
    page = page_of(tmp_path, folder)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["a"]
    assert (summary["steps"], summary["finished"]) == (50, False)
    assert "stopped early" in page


def test_of_a_script_nobody_knows_whether_it_stopped_early(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", summary=None)
    page = page_of(tmp_path, folder)
    assert "finished" not in json.loads((tmp_path / "out" / "summary.json").read_text())["a"]
    assert "stopped early" not in page


def test_only_settings_that_differ_are_listed(make_run: MakeRun, tmp_path: Path) -> None:
    configs = [{"about": {"title": str(lr)}, "seed": 0, "model": {"lr": lr, "same": [1, 2]}} for lr in (0.1, 0.2)]
    first, second = (make_run(name, resolved=config) for name, config in zip("ab", configs, strict=True))
    table = page_of(tmp_path, first, second).split("What differs in the configuration</h2>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["model.lr"]
    assert re.findall(r"<td>(.*?)</td>", table) == ["0.1", "0.2"]


def test_recipes_are_described_once_if_equal_and_by_run_if_not(make_run: MakeRun, tmp_path: Path) -> None:
    abouts = [{"about": {"title": title}} for title in ("one", "one", "two")]
    a, b, c = (make_run(name, resolved=about) for name, about in zip("abc", abouts, strict=True))
    head = page_of(tmp_path, a, b).split("</header>")[0]
    assert head.count('<p class="lead">one</p>') == 1
    head = page_of(tmp_path, c, a).split("</header>")[0]
    assert '<p class="lead">c: two</p><p class="lead">a: one</p>' in head


def test_bars_of_all_runs_have_one_scale(make_run: MakeRun, tmp_path: Path) -> None:
    states = (16.0, 4.0)
    runs = [make_run(f"r{state:g}", summary={"optimizer_state_mib": state, "finished": True}) for state in states]
    widths = [float(width) for width in re.findall(r'class="bar" style="width:([\d.]+)rem', page_of(tmp_path, *runs))]
    assert widths[0] == 4 * widths[1] > 0


def test_console_names_the_runs_and_the_files(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_report(make_run("adamw"), make_run("lowrank", 0.25), "--out", tmp_path / "my page.html")
    printed = capsys.readouterr().out
    assert "lowrank" in printed
    assert "+0.25" in printed
    assert (tmp_path / "my page.html").is_file()
    assert (tmp_path / "summary.json").is_file()


def test_other_data_are_told_on_the_console_and_on_the_page(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (make_run(name, resolved={"data": {"class_path": f"<{name}>"}}) for name in "ab")
    said = "The scores of these runs may not be comparable: they differ in data.class_path ({})"
    assert said.format("&lt;a&gt;, &lt;b&gt;") in page_of(tmp_path, a, b)
    assert said.format("<a>, <b>") in capsys.readouterr().err


def test_picture_is_a_png_of_150_dots_per_inch(make_run: MakeRun, tmp_path: Path) -> None:
    from PIL import Image

    run_report(make_run("a"), make_run("b"), "--out", tmp_path / "out", "--png", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert (image.format, round(image.info["dpi"][0])) == ("PNG", 150)
        assert image.width > 900


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, r"run folder '.*/x' does not exist; name the folder in which `lightspan fit` wrote"),
        (lambda folder: folder.mkdir(), r"'.*/x' is not a run folder: it has no metrics.jsonl"),
        (lambda folder: folder.write_text(""), r"run folder '.*/x' is a file"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, prepare: Callable[[Path], None], message: str) -> None:
    prepare(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        run_report(tmp_path / "x", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_tells_which_runs_to_name(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("all/a")
    make_run("all/b")
    with pytest.raises(UserError, match="it contains the runs a, b: name those"):
        run_report(tmp_path / "all", "--out", tmp_path / "out")


def test_a_run_without_metrics_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", rows=[{"step": 0, "time_s": 0.0, "epoch": 0}])
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"run '.*/a' has logged no metric yet; wait .*log_every_n_steps"):
        run_report(folder, "--out", tmp_path / "out")


def test_a_short_run_that_logged_nothing_ends_well_and_says_how_to_get_a_report(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a", rows=[{"step": 0, "time_s": 0.0, "epoch": 0}], summary={"steps": 1})
    with pytest.raises(UserError, match=r"has logged no metric: .* lower"):
        run_report(folder, "--out", tmp_path / "out")
    fit._write_report(folder)  # as `fit --images` does at its end
    assert "no report was written" in capsys.readouterr().err
    assert not (folder / "report").exists()


def test_a_run_that_has_only_begun_is_told_apart_from_a_folder_that_is_none(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", resolved={"trainer": {"max_steps": 3}})
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"run '.*/a' has logged no metric yet; wait .*log_every_n_steps"):
        run_report(folder, "--out", tmp_path / "out")


HUGE = "9" * 400
EDGES = ["5e-324", "-5e-324", "1e308", "-1e308", "1e999", HUGE, f"-{HUGE}", f"0.{HUGE}", "9" * 5000]


@pytest.mark.sample(9)
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge[:9])
@pytest.mark.parametrize("name", ["val/loss_nats", "spectrum/w/0", "time_s", "probe/a"])
def test_numbers_at_the_edge_of_floats_are_drawn_or_counted(
    make_run: MakeRun, tmp_path: Path, edge: str, name: str
) -> None:
    """Alone, twice, and beside an ordinary number: as values, as abscissae, on linear and on logarithmic axes."""
    folder = make_run("a", rows=[], summary={"val_loss_nats": 1.0})
    lines = [f'{{"step": {at}, "time_s": {at}, "val/b": 1, "{name}": {value}}}' for at, value in enumerate((edge, 1))]
    lines += [f'{{"step": 3, "val/b": 2, "{name}": {edge}, "spectrum/w/1": 2.0, "spectrum/v/{HUGE}": {edge}}}']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "summary.json").write_text(
        f'{{"val_loss_nats": {edge}, "seconds": {edge}, "steps": {edge}, "best": [{{"a": {edge}}}]}}'
    )
    page = page_of(tmp_path, folder, make_run("b"), "--png", tmp_path / "curves.png")
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)


@pytest.mark.parametrize("depth", [100, 100_000])
@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json", "provenance.json", "samples.jsonl", "resolved.yaml"])
def test_what_is_nested_too_deep_is_refused(make_run: MakeRun, tmp_path: Path, file: str, depth: int) -> None:
    folder = make_run("a")
    line = '{"step": 0, "x": ' + "[" * depth + "]" * depth + "}\n"
    (folder / file).write_text(line * 2 if file.endswith("jsonl") else line)  # a last line may be cut off
    with pytest.raises(UserError, match=f"{file}.*(nested|levels|mapping|YAML|values)"):
        run_report(folder, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1]\n" + "".join(f"{c}: &{c} [*{b}, *{b}, *{b}, *{b}]\n" for b, c in pairwise("abcdefghij")),
        "a: &a [*a]\n",
        "a: !!python/object/apply:os.system [id]\n",
        "- 1\n",
    ],
    ids=["aliases that grow", "an alias of itself", "a tag", "a list"],
)
def test_a_configuration_is_read_as_strictly_as_a_recipe(make_run: MakeRun, tmp_path: Path, text: str) -> None:
    folder = make_run("a")
    (folder / "resolved.yaml").write_text(text)
    with pytest.raises(UserError, match=r"resolved.yaml"):
        run_report(folder, "--out", tmp_path / "out")


def test_half_a_character_in_a_file_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", samples=[{"step": 0, "text": "half \ud83d"}], provenance={"k\udc80": "v"})
    assert "<pre>half ?" in page_of(tmp_path, folder)


def test_a_broken_line_is_named_by_file_and_number(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "{oops", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not JSON .*'\{oops'; fix or remove it"):
        run_report(folder, "--out", tmp_path / "out")


def test_the_runs_own_summary_is_never_overwritten(make_run: MakeRun) -> None:
    folder = make_run("a")
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(UserError, match=r"would overwrite summary.json of run folder .* the run's own"):
        run_report(folder, "--out", folder)
    assert (folder / "summary.json").read_bytes() == before


def test_a_picture_needs_a_validation_metric(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a", rows=[{"step": 0, "time_s": 0.0, "train/loss": 1.0}])
    with pytest.raises(UserError, match=r"none of a logged a val/ metric; leave --png out"):
        run_report(folder, "--out", tmp_path / "out", "--png", tmp_path / "curves.png")
    assert not (tmp_path / "out").exists()


@pytest.mark.runs
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_opens_in_a_browser(make_run: MakeRun, tmp_path: Path) -> None:
    from PIL import Image

    page_of(tmp_path, make_run("adamw"), make_run("lowrank", 0.3))
    shot = tmp_path / "shot.png"
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--blink-settings=preferredColorScheme=1"),
        *("--window-size=1100,1600", f"--screenshot={shot}", (tmp_path / "out" / "report.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert shot.is_file(), done.stderr[-2000:]
    with Image.open(shot) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    # The curves of both runs, drawn with the style sheet's colours: neither the styles nor the SVG were refused.
    assert {(0x1F, 0x5F, 0xD0), (0xD1, 0x56, 0x0F)} <= colours


def test_a_place_that_cannot_be_written_is_laid_to_the_option_that_chose_it(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make folder .*file/out: .*; .* with --out"):
        run_report(folder, "--out", tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"cannot make folder .*file/out: .*; .* with --png"):
        run_report(folder, "--out", tmp_path / "out", "--png", tmp_path / "file" / "out" / "curves.png")
