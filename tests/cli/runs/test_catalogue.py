"""The catalogue reads what stands in run folders, whatever state they are in, and writes nothing into them."""

import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from run_folder_fixtures import MakeRun

from lightspan.cli.runs.catalogue import find_runs, read_entry, read_progress
from lightspan.cli.runs.direction import better
from lightspan.cli.runs.filters import RunFilter, parse_setting, parse_since
from lightspan.cli.runs.labels import note_of, set_note, set_tags, tags_of
from lightspan.cli.runs.metrics import MetricValues, read_logged
from lightspan.cli.runs.status import Status
from lightspan.core.errors import UserError


def provenance(*words: str, **more: object) -> dict[str, object]:
    return {"recipe": "language/quickstart", "argv": ["lightspan", "fit", "language/quickstart", *words], **more}


def test_runs_are_found_at_any_depth_but_not_inside_runs_or_behind_links(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("all/a", "all/deep/er/b", "elsewhere/c"):
        make_run(name)
    make_run("all/a/inside")
    (tmp_path / "all" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "loop").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "no run").mkdir()
    assert find_runs([tmp_path / "all"]) == [tmp_path / "all" / "a", tmp_path / "all" / "deep" / "er" / "b"]
    assert find_runs([tmp_path / "all" / "link"]) == [tmp_path / "all" / "link" / "c"]
    assert find_runs([tmp_path / "all" / "a", tmp_path / "all" / "a"]) == [tmp_path / "all" / "a"]
    with pytest.raises(UserError, match="nowhere does not exist; name the folder that contains your runs"):
        find_runs([tmp_path / "nowhere"])


def test_the_runs_of_a_sweep_are_listed_though_it_locks_its_own_folder(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("sweep/000"), make_run("sweep/001")]
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "sweep" / ".lightspan.lock").write_text("process 1 on node-7\n")
    assert find_runs([tmp_path]) == runs
    assert find_runs([tmp_path / "sweep"]) == runs


def test_an_entry_says_what_was_typed_beside_the_recipe_and_when_it_was_first_started(make_run: MakeRun) -> None:
    words = ["-c", "scale/cpu2", "model.lr=1e-3", "--seed_everything", "3", "--run", "runs/x", "--resume=auto"]
    earlier = [{"started": "2026-01-02T03:04:05+00:00"}, {"started": "2026-01-03T00:00:00+00:00"}]
    run = make_run("a", provenance=provenance(*words, started="2026-01-04T00:00:00+00:00", earlier=earlier))
    (run / ".lightspan.lock").write_text("process 12 on node-7\n")
    entry = read_entry(run)
    assert (entry.recipe, entry.host, entry.status) == ("language/quickstart", "node-7", Status.DONE)
    assert entry.words == ["-c", "scale/cpu2"]
    assert entry.flags == {"model.lr": "1e-3", "seed_everything": "3"}
    assert entry.started == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", "[" * 10**5),
        '{"recipe": [1], "argv": 3, "started": "soon", "earlier": {}}',
        '{"started": "0001-01-01T00:00:00"}',
    ],
)
def test_a_damaged_record_leaves_gaps(make_run: MakeRun, text: str) -> None:
    run = make_run("a")
    (run / "provenance.json").write_text(text)
    entry = read_entry(run)
    assert (entry.recipe, entry.flags, entry.words, entry.started) == ("", {}, [], None)


def test_last_lowest_and_highest_value_of_a_metric_are_those_of_the_whole_lines(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "time_s": 0.5, "val/loss": 3.0, "acc": True},
        {"step": 1, "time_s": 1.0, 'a "val/loss": 9': 9.0, "my val/loss": 8.0, "val/loss": None},
        {"step": 2, "time_s": 1.5, "val/loss": -1.5e-3},
        {"step": 3, "time_s": 2.5, "val/loss": 2},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "val/loss": 1')
    found = read_logged(path, ["val/loss", "acc", "missing"])
    assert (found.steps, found.seconds) == (4, 2.5)
    assert found.values == {"val/loss": MetricValues(2.0, -1.5e-3, 3.0), "acc": MetricValues(None, None, None)}


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["train/loss", "lr", "val/acc", "val/loss_nats"], "val/loss_nats"),
        (["train/loss", "val_acc"], "val_acc"),
        (["lr", "train/loss"], "train/loss"),
        (["lr"], None),
    ],
)
def test_without_a_name_it_is_the_validation_loss_or_what_comes_nearest(
    tmp_path: Path, names: list[str], first: str | None
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **dict.fromkeys(names, 1.0)}) + "\n")
    assert list(read_logged(tmp_path / "metrics.jsonl", []).values) == [*filter(None, [first])]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "half",
        "[1]\n",
        '{"step": "x", "time_s": []}\n',
        '{"step": 1' + "0" * 5000 + "}\n",
        "\0\n",
        "[" * 10**5 + "\n",
    ],
)
def test_a_damaged_log_gives_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    found = read_logged(tmp_path / "metrics.jsonl", ["val/loss"])
    assert (found.steps, found.seconds, found.values) == (None, None, {})


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "provenance.json", "tags.txt", "note.txt"])
def test_a_pipe_in_the_place_of_a_file_stops_nobody(make_run: MakeRun, name: str) -> None:
    run = make_run("a")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    read_entry(run)
    read_progress(run)


def test_progress_is_the_summary_where_the_log_ends_earlier(make_run: MakeRun) -> None:
    run = make_run("a", summary={"steps": 53, "seconds": 9.5, "finished": True})
    progress = read_progress(run)
    assert (progress.steps, progress.seconds) == (53, 9.5)
    assert list(progress.values) == ["val/loss_nats"]


@pytest.mark.parametrize(
    ("selection", "has"),
    [
        (RunFilter(), True),
        (RunFilter(statuses=[Status.FAILED, Status.DONE]), True),
        (RunFilter(statuses=[Status.FAILED]), False),
        (RunFilter(recipes=["vision/*", "lang*/quick*"]), True),
        (RunFilter(recipes=["quick*"]), False),
        (RunFilter(settings=[("model.lr", "0.001")]), True),
        (RunFilter(settings=[("model.lr", "0.002")]), False),
        (RunFilter(settings=[("model.parts.1.name", "b"), ("model.flag", "true"), ("model.none", "null")]), True),
        (RunFilter(settings=[("model.parts.2.name", "b")]), False),
        (RunFilter(settings=[("model.parts.x", "b")]), False),
        (RunFilter(tags=["paper"]), True),
        (RunFilter(tags=["paper", "other"]), False),
        (RunFilter(since=datetime(2026, 1, 1, tzinfo=UTC)), True),
        (RunFilter(since=datetime(2026, 1, 3, tzinfo=UTC)), False),
    ],
)
def test_a_selection_has_the_runs_that_meet_all_of_it(make_run: MakeRun, selection: RunFilter, has: bool) -> None:
    config = {"model": {"lr": 5.0, "flag": True, "none": None, "parts": [{"name": "a"}, {"name": "b"}]}}
    record = provenance("model.lr=1e-3", started="2026-01-02T00:00:00+00:00")
    run = make_run("a", resolved=config, provenance=record)
    set_tags(run, ["paper", "baseline"])
    assert selection.has(read_entry(run)) is has


def test_times_are_ages_or_dates() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert parse_since("90m", now) == now - timedelta(minutes=90)
    assert parse_since("1.5d", now) == now - timedelta(days=1.5)
    assert parse_since("2026-01-31T10:00:00+00:00") == now - timedelta(hours=2)
    assert parse_since("2026-01-31").tzinfo is not None
    for wrong in ("", "soon", "3y", "-3d", "2026-13-01", "999999999w"):
        with pytest.raises(UserError, match=r"is no time; write 30m, 12h, 7d, 2w, or a date"):
            parse_since(wrong)
    with pytest.raises(UserError, match=r"--where 'lr' is not of the form key\.path=value"):
        parse_setting("lr")


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("val/loss_nats", "lower"),
        ("val_loss", "lower"),
        ("val/bits_per_byte", "lower"),
        ("probe/knn_acc", "higher"),
        ("val/accuracy", "higher"),
        ("throughput/samples", "neither"),
        ("accumulated", "neither"),
    ],
)
def test_the_direction_of_a_metric_follows_from_its_words(metric: str, direction: str) -> None:
    assert better(metric) == direction


def test_tags_and_notes_are_kept_sorted_and_removed_with_their_last_word(make_run: MakeRun) -> None:
    run = make_run("a")
    set_tags(run, ["b", "a", "b"])
    set_note(run, "first\nsecond")
    assert (tags_of(run), note_of(run)) == (("a", "b"), "first\nsecond")
    for wrong in ("two words", "", "x" * 65, "a/b", "\x1b"):
        with pytest.raises(UserError, match="is no tag: a tag is one word of at most 64"):
            set_tags(run, [wrong])
    with pytest.raises(UserError, match="the note has 10,001 characters"):
        set_note(run, "x" * 10_001)
    before = sorted(path.name for path in run.iterdir())
    set_tags(run, [])
    set_note(run, "")
    assert sorted(path.name for path in run.iterdir()) == [n for n in before if n not in ("tags.txt", "note.txt")]


def test_of_each_run_a_few_small_files_are_opened(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So two thousand runs are listed at once. The large resolved.yaml is not among the files, and of metrics.jsonl
    a few lines are parsed, however long it is.
    """
    sources = {f"model.init_args.part_{at}.setting": f"recipes/language/quickstart.yaml:{at}" for at in range(60)}
    record = provenance("seed_everything=3", started="2026-01-04T00:00:00+00:00", sources=sources)
    parsed: list[int] = []
    for length in (1, 4):
        run = make_run(f"runs/{length}", rows=[], provenance=record, resolved={"a": 1})
        (run / "metrics.jsonl").write_text(LOG * length)
    runs, loads = find_runs([tmp_path / "runs"]), json.loads
    for run in runs:
        lines: list[object] = []
        with monkeypatch.context() as patch, opened_files() as opened:
            patch.setattr(json, "loads", lambda text, lines=lines: lines.append(text) or loads(text))
            assert read_progress(read_entry(run).folder).values["val/loss_nats"].lowest == 1.0
        parsed.append(len(lines))
        below = [Path(path).name for path in opened if Path(path).is_relative_to(run)]
        assert len(below) <= 12
        assert max(Counter(below).values()) <= 2  # by the entry and by the progress
        assert {"metrics.jsonl", "provenance.json"} <= set(below)
        assert "resolved.yaml" not in below
    assert parsed[0] == parsed[1] < 20


@contextlib.contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files that this process opens meanwhile. An audit hook stays for good, and then sees nothing."""
    opened: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        # What os.open opens has no mode, and `files.opened` then opens it as a file, which has one.
        if watching and event == "open" and isinstance(arguments[0], str) and arguments[1] is not None:
            opened.append(arguments[0])

    sys.addaudithook(hook)
    yield opened
    watching.clear()


LOG = "".join(
    json.dumps({"step": step, "time_s": step / 10, "train/loss": math.exp(-step), f"{kind}/loss_nats": 300.0 - step})
    + "\n"
    for step in range(300)
    for kind in ["test", "val"][: 1 + (step % 10 == 9)]
)
