"""The comparison of representation learning: every method has its place, every entry trains, and the page is what the
records say.
"""

import ast
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence.zoo import __main__ as command
from evidence.zoo import closer, longer, methods, page, pictures, records, table, training
from evidence.zoo.records import OURS, SEARCH_SEED, SEEDS, THEIRS, UNTRAINED, Cell, Row
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Labelled
from lightspan.training.method import Method

ROOT = Path(__file__).parents[2]
STEPS, SIZE = 2, 12


@pytest.fixture(scope="module")
def split() -> pictures.Split:
    """36 pictures to train, 24 to choose by and to test."""
    whole = pictures.load("fashion")

    def some(data: Labelled, count: int) -> Labelled:
        return Labelled(data.images[:count], data.labels[:count])

    assert whole.val is not None
    return pictures.Split(some(whole.train, 36), some(whole.val, 24), some(whole.test, 24), whole.mean, whole.std)


def task_of(split: pictures.Split, encoder: str) -> methods.Task:
    """As of so many pictures that all prototypes have one."""
    return training.task_of(split, encoder)._replace(images=200)


@pytest.fixture(scope="module")
def made(split: pictures.Split) -> dict[str, list[pictures.Batch]]:
    kinds = {entry.views for entry in methods.ENTRIES.values()}
    return {kind: pictures.batches(split, kind, 0, STEPS, SIZE) for kind in kinds}


def families() -> Iterator[tuple[str, str]]:
    """(family, module) of each file of methods."""
    for file in sorted((ROOT / "framework/methods").glob("*/*.py")):
        if file.stem != "__init__":
            yield file.parent.name, f"lightspan.methods.{file.parent.name}.{file.stem}"


def test_every_method_of_pictures_has_an_entry_or_a_reason(split: pictures.Split) -> None:
    task = task_of(split, "ViT")
    entered = {type(entry.build(task, **training.optimisation(1e-3))) for entry in methods.ENTRIES.values()}
    lacking, seen = [], set()
    for family, name in families():
        module = importlib.import_module(name)
        seen.add(family)
        for found in vars(module).values():
            is_method = isinstance(found, type) and issubclass(found, Method) and found.__module__ == name
            if is_method and family not in methods.OTHER_FAMILIES and found not in entered:
                lacking += [found.__name__] if found.__name__ not in methods.LEFT_OUT else []
    assert len(entered) >= 20  # Barlow Twins is Mixed Barlow Twins without its second term
    assert not lacking, f"{lacking} of lightspan.methods need an entry or a reason in evidence/zoo/methods.py"
    assert seen >= methods.OTHER_FAMILIES.keys(), "a reason for a family that is not there"


def entries() -> list[Any]:
    return [(encoder, arm) for arm, entry in methods.ENTRIES.items() for encoder in entry.encoders]


@pytest.mark.sample(10)
@pytest.mark.parametrize(("encoder", "arm"), entries())
def test_an_entry_trains_its_encoder(
    encoder: str, arm: str, split: pictures.Split, made: dict[str, list[pictures.Batch]]
) -> None:
    task = task_of(split, encoder)
    trained = training.train(arm, task, 1e-3, 0, made[methods.ENTRIES[arm].views])
    found, labels = training.encoded(trained.features, split, "test")
    assert found.shape == (24, task.encoder().num_features)
    assert found.isfinite().all()
    assert labels.shape == (24,)
    assert trained.step_ms is not None
    assert trained.step_ms > 0
    before, _ = training.encoded(training.untrained(task, 0).features, split, "test")
    assert not torch.equal(found, before)
    assert (trained.student is not None) == (arm == "DINO")
    if trained.student is not None:
        assert not torch.equal(training.encoded(trained.student, split, "test")[0], found)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("encoder", "arm"), [pair for pair in entries() if pair[1] in records.PEER_ARMS])
def test_a_peer_trains_its_encoder_by_as_many_steps(
    encoder: str, arm: str, split: pictures.Split, made: dict[str, list[pictures.Batch]]
) -> None:
    peers = pytest.importorskip("evidence.zoo.lightly_methods", exc_type=ImportError).PEERS
    assert peers.keys() == set(records.PEER_ARMS)
    task, batches = task_of(split, encoder), made[methods.ENTRIES[arm].views]
    trained = training.train_peer(arm, task, 1e-3, 0, batches)
    found, _ = training.encoded(trained.features, split, "test")
    assert found.isfinite().all()
    ours, theirs = training.interleaved(arm, task, batches)
    assert len(ours) == len(theirs) == STEPS


def test_batches_are_a_function_of_the_seed_and_cover_the_pictures(split: pictures.Split) -> None:
    first, again, other = (pictures.batches(split, "two", seed, 4, SIZE) for seed in (0, 0, 1))
    for batch, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch["views"], same["views"], strict=True))  # type: ignore[call-overload]
    assert not torch.equal(first[0]["views"][0], other[0]["views"][0])  # type: ignore[index]
    rows = torch.cat([batch["index"] for batch in first[:3]])  # type: ignore[misc]
    assert sorted(rows.tolist()) == list(range(36))


def test_passes_give_every_batch_once_whoever_asks_for_an_iterator(split: pictures.Split) -> None:
    batches = pictures.batches(split, "one", 0, 5, SIZE)
    passes = pictures.Passes(batches, 36)
    iter(passes)  # asked for and not used
    assert [*passes, *passes] == batches
    with pytest.raises(AssertionError):
        next(iter(passes))


def cell_row(cell: Cell, knn: float, linear: float, **others: Any) -> Row:
    about = {
        "commit": "abc",
        "date": "2026-11-26T00:00:00",
        "cpu": "Abacus 3",
        "torch": "2.13",
        "steps": 2,
        "batch": 64,
    }
    return {"kind": "cell", **cell._asdict(), **about, "knn": knn, "linear": linear, "step_ms": 10.0, **others}


def searched(arm: str, knns: dict[float, float | None], by: str = OURS) -> list[Row]:
    """The search of an arm on the conv net; None diverged."""
    return [
        cell_row(Cell(by, arm, "fashion", "conv net", rate, SEARCH_SEED), knn or 0.0, knn or 0.0)
        | ({"error": "not finite"} if knn is None else {})
        for rate, knn in knns.items()
    ]


def test_the_search_takes_the_best_rate_and_the_smaller_of_equal_ones() -> None:
    low, middle, high = records.RATES
    rows = searched("SimCLR", {low: 50.0, middle: 60.0, high: 60.0})
    rows += searched("BYOL", {low: 1.0, middle: 0.5}) + searched("VICReg", {low: 1.0, middle: None, high: None})
    for data in ("fashion", "openclipart"):
        assert records.chosen_rate(rows, OURS, "SimCLR", data, "conv net") == middle
        assert records.chosen_rate(rows, OURS, "VICReg", data, "conv net") == low
        assert records.chosen_rate(rows, OURS, "BYOL", data, "conv net") is None  # not complete


def tried(arm: str, scores: dict[float, float | None], by: str = OURS) -> list[Row]:
    """The search of an arm of the longer runs; None diverged."""
    return [
        cell_row(Cell(by, arm, longer.DATA, longer.ENCODER, rate, SEARCH_SEED), score or 0.0, score or 0.0)
        | ({"error": "not finite"} if score is None else {})
        for rate, score in scores.items()
    ]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({}, [1e-3, 3e-3, 1e-2]),
        ({1e-3: 1.0, 3e-3: 2.0}, [1e-2]),
        ({1e-3: 1.0, 3e-3: 2.0, 1e-2: 1.0}, []),
        ({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}, [3e-2]),
        ({1e-3: 2.0, 3e-3: 2.0, 1e-2: None}, [3e-4]),
        ({3e-4: 3.0, 1e-3: 2.0, 3e-3: 1.0, 1e-2: 0.0}, [1e-4]),
        ({1e-4: 4.0, 3e-4: 3.0, 1e-3: 2.0, 3e-3: 1.0, 1e-2: 0.0}, []),  # the grid ends
    ],
)
def test_the_longer_search_goes_on_until_its_best_is_no_edge(
    scores: dict[float, float | None], wanted: list[float]
) -> None:
    rows = tried("MAE", scores)
    assert longer.wanted(longer.searched(rows, OURS, "MAE")) == wanted
    assert {cell.rate for cell in longer.searches(rows) if (cell.by, cell.arm) == (OURS, "MAE")} == {*wanted}
    found = {cell.rate for cell in longer.reports(rows) if cell.arm == "MAE"}
    assert found == (set() if wanted else {max(sorted(scores), key=lambda rate: scores[rate] or 0.0)})


def test_the_longer_runs_are_planned_until_each_search_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = []
    score = {rate: float(place) for place, rate in enumerate(longer.GRID)}  # the greatest rate is the best for all
    for plan in command.plans(rows, longer.DATA):
        rows += [cell_row(cell, score.get(cell.rate, 0.0), score.get(cell.rate, 0.0)) for cell in plan]
    assert len(rows) == len(records.done(rows))
    runs = [cell for cell in records.done(rows) if cell.seed in SEEDS]
    arms = {(by, arm) for by, each in longer.ARMS.items() for arm in each}
    assert {(cell.by, cell.arm) for cell in runs} == arms | {(OURS, UNTRAINED)}
    assert len(runs) == len(SEEDS) * (1 + len(arms))
    assert {cell.rate for cell in runs if cell.arm != UNTRAINED} == {longer.GRID[-1]}


def test_the_page_tells_the_longer_runs_from_the_untrained_encoder_and_from_lightly() -> None:
    middle = dict.fromkeys(records.RATES, 1.0) | {3e-3: 2.0}
    rows = tried("MAE", middle) + tried("MAE", middle, THEIRS) + tried("BYOL", middle)
    runs = {(OURS, UNTRAINED): 50.0, (OURS, "MAE"): 60.0, (OURS, "BYOL"): 51.0, (THEIRS, "MAE"): 57.0}
    for (by, arm), score in runs.items():
        for seed, off in zip(SEEDS, (-1.0, 0.0, 1.0), strict=True):
            rate = 0.0 if arm == UNTRAINED else 3e-3
            cell, at = Cell(by, arm, longer.DATA, longer.ENCODER, rate, seed), score + off
            curve = [{"step": step, "knn": at, "linear": at + 10} for step in longer.looks(2)]
            rows.append(cell_row(cell, at, at + 10, **({} if arm == UNTRAINED else {"curve": curve})))
    text = page.page(rows)
    for line in (
        "| MAE | lightspan | 0.003 of 0.001, 0.003 and 0.01 | 60.0 ± 1.0 | +10.0 | 70.0 ± 1.0 | +10.0 | 10 |",
        "| untrained |  |  | 50.0 ± 1.0 |  | 60.0 ± 1.0 |  | 10 |",
        "- **kNN** (noise 1.6 points): 2 of 3 are above the untrained encoder's 50.0; not so BYOL (lightspan). "
        "lightspan less lightly: MAE +3.0.",
        "runs or more are not measured yet",
    ):
        assert line in text, line
    assert longer.figure(rows).startswith(b"\x89PNG")
    assert not table.Table(rows).data()  # the tables of short runs have none of them


def closely(by: str, scores: dict[float, list[float]]) -> list[Row]:
    """The search and the closer one of SwAV on the ViT: of each rate a score a seed."""
    seeds = (SEARCH_SEED, *closer.FURTHER)
    return [
        cell_row(Cell(by, "SwAV", "fashion", "ViT", rate, seed), score, score)
        for rate, each in scores.items()
        for seed, score in zip(seeds, each, strict=True)
    ]


def test_the_closer_search_takes_the_mean_over_all_its_seeds_and_waits_for_the_last_run() -> None:
    low, middle, high = records.RATES
    rows = closely(OURS, {low: [70.0, 60.0, 60.0, 60.0], middle: [69.0, 63.0, 63.0, 63.0], high: [0.0] * 4})
    assert records.chosen_rate(rows, OURS, "SwAV", "fashion", "ViT") == low
    assert closer.scores(rows, OURS, "SwAV", "ViT") == {low: 62.5, middle: 64.5, high: 0.0}
    assert closer.reports(rows) == [Cell(OURS, "SwAV", "fashion", "ViT", middle, seed) for seed in SEEDS]
    assert closer.reports(rows[:-1]) == []
    assert {cell.seed for cell in closer.searches()}.isdisjoint((SEARCH_SEED, *SEEDS))


def test_the_closer_look_compares_at_its_own_rates() -> None:
    low, middle, high = records.RATES
    rows = closely(OURS, {low: [70.0, 60.0, 60.0, 60.0], middle: [69.0, 63.0, 63.0, 63.0], high: [0.0] * 4})
    rows += closely(THEIRS, {low: [50.0] * 4, middle: [60.0] * 4, high: [50.0] * 4})
    for by, rate, score in ((OURS, low, 40.0), (OURS, middle, 60.0), (THEIRS, middle, 62.0)):
        rows += [
            cell_row(Cell(by, "SwAV", "fashion", "ViT", rate, seed), score + off, score + off)
            for seed, off in zip(SEEDS, (-1.0, 0.0, 1.0), strict=True)
        ]
    text = page.page(rows)
    for line in (
        "| SwAV | ViT | lightspan | 62.5 | 64.5 | 0.0 | 0.001 | 0.003 |",
        "| SwAV | ViT | lightly | 50.0 | 60.0 | 50.0 | 0.003 | 0.003 |",
        "| SwAV | ViT" + 2 * " | 60.0 ± 1.0 | 62.0 ± 1.0 | -2.0, lightly higher" + " |",
    ):
        assert line in text, line
    assert "set lightspan's SwAV" not in text  # the first rate was not the worst, and a difference is left
    assert "A closer look" not in page.page(rows[:3])
    rows = closely(OURS, {low: [70.0, 50.0, 50.0, 50.0], middle: [69.0, 63.0, 63.0, 63.0], high: [60.0] * 4})
    rows += closely(THEIRS, {low: [50.0] * 4, middle: [60.0] * 4, high: [50.0] * 4})
    rows += [
        cell_row(Cell(by, "SwAV", "fashion", "ViT", rate, seed), 60.0 + seed, 60.0 + seed)
        for by, rate in ((OURS, low), (OURS, middle), (THEIRS, middle))
        for seed in SEEDS
    ]
    assert "it was the search that set lightspan's SwAV on the ViT back" in page.page(rows)


def test_equal_rates_seeds_and_steps_are_planned_for_all() -> None:
    plan = records.searches("openclipart")
    assert {cell.data for cell in plan} == {"fashion"}
    per_arm = len(records.RATES)
    assert (
        len(plan)
        == len(set(plan))
        == per_arm * (len(entries()) + sum(arm in records.PEER_ARMS for _, arm in entries()))
    )
    report = records.reports([], "openclipart")
    assert all(math.isnan(cell.rate) for cell in report if cell.arm != UNTRAINED)
    assert {cell.seed for cell in report} == set(SEEDS)
    assert SEARCH_SEED not in SEEDS


@pytest.mark.parametrize("by", [OURS, THEIRS])
def test_a_run_that_is_watched_goes_on_as_if_nobody_had_looked(
    by: str, split: pictures.Split, made: dict[str, list[pictures.Batch]]
) -> None:
    if by == THEIRS:
        pytest.importorskip("evidence.zoo.lightly_methods", exc_type=ImportError)
    run = training.train if by == OURS else training.train_peer
    task, batches = task_of(split, "ViT"), made["crops"]
    watching = training.Watching(split, "test", [1, STEPS])
    found = [
        training.encoded(run("DINO", task, 1e-2, 0, batches, each).features, split, "test")[0]
        for each in (None, watching)
    ]
    assert torch.equal(*found)
    assert [point["step"] for point in watching.curve] == [1, STEPS]
    last = training.scores(run("DINO", task, 1e-2, 0, batches).features, split, "test")
    assert watching.curve[-1] == {"step": STEPS, **{name: round(value, 3) for name, value in last.items()}}


def test_probes_read_the_first_training_pictures_alone(split: pictures.Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PROBED", 10)
    few = pictures.Split(split.train, split.val, split.test, split.mean, split.std)
    assert {part: len(images) for part, images in few.images.items()} == {"train": 10, "val": 24, "test": 24}
    features, labels = training.encoded(lambda images: images.flatten(1), few, "train")
    assert len(features) == 10
    assert labels.tolist() == split.train.labels[:10].tolist()


def test_what_stands_in_the_file_is_never_run_again(
    tmp_path: Path, split: pictures.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Cell] = []

    def measured(cell: Cell, batches: list[pictures.Batch]) -> Row:
        ran.append(cell)
        if len(ran) == 5:
            raise KeyboardInterrupt
        assert len(batches) == (0 if cell.arm == UNTRAINED else STEPS)
        return {"knn": 50.0, "linear": 60.0, "step_ms": None}

    monkeypatch.setattr(command, "measured", measured)
    monkeypatch.setattr(command, "speeds", lambda steps: iter(()))
    monkeypatch.setattr(command.lightly_views, "measure", lambda split: iter(()))
    monkeypatch.setattr(command.pictures, "load", lambda name: split)
    monkeypatch.setattr(command.training, "BATCH", SIZE)
    plan = records.searches("fashion")[:8]
    monkeypatch.setattr(command, "plans", lambda rows, data: iter([plan]))
    arguments = ["run", "--data", "fashion", "--steps", str(STEPS), "--records", str(tmp_path / "zoo.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert len(records.read(tmp_path / "zoo.jsonl")) == 4
    threads = torch.get_num_threads()
    command.main(arguments)
    torch.set_num_threads(threads)
    assert len(ran) == 1 + len(set(ran)) == 1 + len(plan)  # the interrupted one twice
    command.main(arguments)
    assert len(ran) == 1 + len(set(ran))


def test_a_run_that_diverges_is_a_record(split: pictures.Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: Any) -> Any:
        raise UserError("features contain NaN")

    monkeypatch.setattr(command.training, "scores", diverged)
    monkeypatch.setattr(command.pictures, "load", lambda name: split)
    row = command.measured(Cell(OURS, UNTRAINED, "fashion", "ViT", 0.0, 0), [])
    assert row == {"error": "features contain NaN"}
    assert records.score(row) == -math.inf


def reported(arm: str, values: tuple[float, float, float], by: str = OURS) -> list[Row]:
    return [
        cell_row(Cell(by, arm, "fashion", "conv net", 0.0 if arm == UNTRAINED else 1e-3, seed), value, value + 10)
        for seed, value in zip(SEEDS, values, strict=True)
    ]


def test_differences_below_the_spread_of_seeds_are_named_as_none() -> None:
    rows = reported(UNTRAINED, (49.0, 50.0, 51.0)) + reported("SimCLR", (59.0, 60.0, 61.0))
    rows += reported("BYOL", (58.0, 59.0, 60.0)) + reported("VICReg", (50.0, 51.0, 52.0))
    rows += reported("MoCo v2", (39.0, 40.0, 41.0)) + reported("SimCLR", (61.0, 62.0, 63.0), THEIRS)
    for by, arm in ((OURS, "SimCLR"), (OURS, "BYOL"), (OURS, "VICReg"), (OURS, "MoCo v2"), (THEIRS, "SimCLR")):
        rows += searched(arm, dict.fromkeys(records.RATES, 1.0), by)  # equal: the least rate is taken
    other = Cell(OURS, "SimCLR", "fashion", "conv net", 3e-3, SEEDS[0])
    rows.append(cell_row(other, 0.0, 0.0))  # of a rate that the search did not choose
    machine = {"commit": "abc", "date": "2026-11-26T00:00:00", "cpu": "Abacus 3", "torch": "2.13"}
    rows += [machine | {"kind": "speed", "arm": "SimCLR", "encoder": "conv net", "ours_ms": [9.0] * 2 + [2.0, 3.0, 2.0],
              "theirs_ms": [1.0] * 2 + [4.0, 2.0, 4.0]}]  # fmt: skip
    # Every deviation is 1, so two means of three seeds are told apart from 2 sqrt(2 / 3) = 1.63 on.
    text = page.page(rows)
    for line in (
        "| SimCLR |  |  |  | 60.0 ± 1.0 | 70.0 ± 1.0 | 10 |",
        "- **conv net, kNN** (noise 1.6 points): SimCLR is ahead with 60.0, within the noise of it: BYOL. Above the "
        "untrained encoder's 50.0: 2 of 4; within the noise of it: VICReg; below it: MoCo v2.",
        "| SimCLR | conv net | 60.0 ± 1.0 | 62.0 ± 1.0 | -2.0, lightly higher | 70.0 ± 1.0 | 72.0 ± 1.0 "
        "| -2.0, lightly higher | 2 | 4 | 0.50 |",
        "Steps slower than lightly's: none.",
        "are not measured yet: of ",
    ):
        assert line in text, line
    ours, theirs = table.Spread(61.6, 1.0, 3), table.Spread(60.0, 1.0, 3)
    assert table.verdict(ours, theirs, 1.63) == "within noise"
    assert table.verdict(ours, theirs._replace(seeds=2), 1.0) == "seeds are missing"


def test_no_records_make_a_page_too() -> None:
    assert "What is missing" in page.page([])


def test_the_page_is_what_the_records_give() -> None:
    rows = records.read(records.RESULTS)
    assert rows
    assert page.PAGE.read_text(encoding="utf-8") == page.page(rows)
    assert page.FIGURE.is_file()


def test_pictures_of_the_comparison_have_the_one_look() -> None:
    for file in (ROOT / "evidence/zoo").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("matplotlib") for name in names), file
