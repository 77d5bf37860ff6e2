"""The comparison of optimisers on small models: what is run, what is never run again, what the table says."""

import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.text.windows import ByteText
from lightspan.optim.matrices.moments import Int8Moments
from lightspan.optim.schedules import WarmupCosine

FILE = Path(__file__).parents[2] / "benchmarks" / "quality.py"
spec = importlib.util.spec_from_file_location("quality", FILE)
assert spec is not None
assert spec.loader is not None
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)


SMALL = {"width": 32, "depth": 1, "heads": 2, "steps": 3, "batch_size": 2}


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """A model of one narrow block on a text of its own, three steps a run."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.py").write_text(f"value_{number} = {number}\n" * 20)
    corpus = partial(ByteText, [str(folder)])
    return replace(quality.TASKS["stdlib"], **SMALL, mlp_width=64, context=16, val_windows=4, corpus=corpus)


@pytest.fixture(scope="module")
def tiny_vit() -> Any:
    """One narrow block on the shipped pictures."""
    return replace(quality.TASKS["vit"], **SMALL, source="shipped", patch_size=14, val_size=4)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that are really trained, in order."""
    calls, train = [], quality.train

    def counted(task: Any, candidate: Any, *run: Any) -> Any:
        calls.append((candidate.name, *run))
        return train(task, candidate, *run)

    monkeypatch.setattr(quality, "train", counted)
    return calls


def row(name: str, seed: int, stage: str, **values: Any) -> dict[str, Any]:
    known = {"task": "stdlib", "optimizer": name, "lr": 2e-3, "other_lr": 1.2e-2, "momentum": 0.9}
    known |= {"seed": seed, "stage": stage}
    return known | {"steps": 300, "online_loss": 2.0, "val_loss": None, "state_bytes": 0, "curve": []} | values


def final(name: str, seed: int, loss: float, state: int, step_ms: float, curve: list[Any]) -> dict[str, Any]:
    times = {"wall_s": curve[-1][1], "cpu_s": curve[-1][2], "step_wall_ms": step_ms, "step_cpu_ms": step_ms / 2}
    return row(name, seed, "final", val_loss=loss, state_bytes=state, curve=curve, **times)


def test_a_finished_run_is_never_run_again(tiny: Any, trained: list[Any], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = ["final", "--only", "adamw", "--results", str(results)]
    assert quality.main(arguments, {tiny.name: tiny}) == 0
    first, written = list(trained), results.read_text()
    assert len(first) == len(set(first)) >= 1 + 8 + 3
    assert [run[2] for run in first if run[3] == "final"] == [0, 1, 2]
    assert quality.main(arguments, {tiny.name: tiny}) == 0
    assert trained == first
    assert results.read_text() == written
    kept = json.loads(written)
    results.write_text(json.dumps([r for r in kept if r["seed"] != 1]))
    assert quality.main(arguments, {tiny.name: tiny}) == 0
    assert trained[len(first) :] == [run for run in first if run[2] == 1]
    again = json.loads(results.read_text())
    assert [r["val_loss"] for r in again] == [r["val_loss"] for r in kept]  # one seed gives one run, bit for bit


def test_two_writers_lose_no_row(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    keys = [(name, seed) for seed in range(8) for name in ("adamw", "muon")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: quality.append(results, row(key[0], key[1], "sweep")), keys))
    assert [(r["optimizer"], r["seed"]) for r in json.loads(results.read_text())] == sorted(keys)


@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", ["tiny", "tiny_vit"])
@pytest.mark.parametrize("name", list(quality.CANDIDATES))
def test_a_run_steps_every_parameter_and_counts_all_state(
    name: str, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, candidate = request.getfixturevalue(kind), quality.CANDIDATES[name]
    model = task.model()
    monkeypatch.setattr(type(task), "model", lambda self: model)
    names = {id(p): n for n, p in model.named_parameters()}
    before = {id(p): p.detach().clone() for p in model.parameters()}
    made = []
    together = quality.optimizers
    monkeypatch.setattr(quality, "optimizers", lambda *all_: made.append(together(*all_)) or made[-1])
    result = quality.train(task, candidate, (1e-3, 2e-3, 0.9), 0, "final")
    groups = [group for optimizer in made[0] for group in optimizer.param_groups]
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(before)
    assert not [names[id(p)] for p in model.parameters() if torch.equal(p, before[id(p)])]
    for group in groups:
        matrices = group["name"] == "matrices"
        assert (group["initial_lr"], group["weight_decay"]) == ((1e-3, 0.1) if matrices else (2e-3, 0.0))
        rank = candidate.options.get("rank") if candidate.rank is None else candidate.rank * 32
        assert rank is None or group["rank"] == rank
        ends = [names[id(p)] for p in group["params"] if "head" in names[id(p)] or "embed" in names[id(p)]]
        assert not matrices or not ends
    tensors = [t for optimizer in made[0] for state in optimizer.state.values() for t in tensors_of(state)]
    assert result["state_bytes"] >= sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values()) > 0
    assert [point[0] for point in result["curve"]] == sorted({round(3 * k / 10) for k in range(1, 11)} - {0})
    assert result["val_loss"] == result["curve"][-1][-1]
    assert abs(result["online_loss"] - math.log(256 if kind == "tiny" else 10)) < 1
    assert [key for key in result if key.startswith("val_")] == ["val_loss"] + ["val_accuracy"] * (kind == "tiny_vit")


def test_every_candidate_of_whole_matrices_has_the_rule_that_the_page_names(tiny: Any) -> None:
    """All steps are as long as AdamW's; queries and keys are taken by heads where the name or a default says so."""

    def matrices(name: str) -> Any:
        return quality.optimizers(quality.CANDIDATES[name], tiny, tiny.model(), (1e-3, 2e-3, 0.8))[0]

    muon = matrices("muon")
    assert type(muon) is torch.optim.Muon
    (group,) = muon.param_groups
    assert (group["adjust_lr_fn"], group["momentum"], group["nesterov"]) == ("match_rms_adamw", 0.8, True)
    for name, by_heads in (("muon_by_heads", True), ("nor_muon", False), ("factored_muon", True)):
        optimizer = matrices(name)
        group = optimizer.param_groups[0]
        assert (group["convention"], group["momentum"], group["precision"]) == ("kimi", 0.8, "float32"), name
        assert optimizer.by_heads == by_heads
        assert group["nu"] == (0.6 if name == "factored_muon" else None)
        assert isinstance(optimizer.moments, Int8Moments) == (name == "factored_muon")
        parts = [optimizer.heads_of(p) for group in optimizer.param_groups for p in group["params"]]
        assert [rows for rows in parts if rows] == [(16, 16)] * (2 if by_heads else 0)  # queries and keys of a block


def test_a_run_follows_its_schedule_and_clips_gradients(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, norms = list[float](), list[float]()

    class Recording(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            return super().step(closure)

    assert quality.CLIP == 1.0
    monkeypatch.setattr(quality, "CLIP", 0.125)
    task = replace(tiny, steps=8)
    quality.train(
        task, replace(quality.CANDIDATES["adamw"], constructor=Recording, options={}), (1.0, 1.0, 0.9), 0, "sweep"
    )
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, expected = WarmupCosine(other, 8), []
    for _ in range(8):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert rates == expected
    assert len(set(rates)) > 4
    assert norms == pytest.approx([0.125] * 8, rel=1e-3)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize("kind", ["tiny", "tiny_vit"])
def test_a_run_of_the_search_is_a_final_one_without_validation(kind: str, request: pytest.FixtureRequest) -> None:
    task, adamw = request.getfixturevalue(kind), quality.CANDIDATES["adamw"]
    searched, final_run = (quality.train(task, adamw, (1e-2, 2e-2, 0.9), 100, stage) for stage in ("sweep", "final"))
    assert searched["online_loss"] == final_run["online_loss"]
    assert (searched["val_loss"], searched["curve"]) == (None, [])
    assert final_run["val_loss"] is not None


def test_validation_is_the_mean_over_pictures_that_are_not_trained_on(tiny_vit: Any) -> None:
    task = replace(tiny_vit, val_size=5, batch_size=2)  # batches of unequal size
    data, model = quality.data_of(task), task.model()
    assert len(data.train) == 3000 - 5
    images, labels = (torch.stack([data.val.sample(i, 0)[key] for i in range(5)]) for key in ("image", "label"))
    with torch.no_grad():
        scores = model(images)
    measures = quality.validate(task, model, data)
    assert measures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)
    assert measures["accuracy"] == pytest.approx((scores.argmax(1) == labels).float().mean().item())


def test_sizes_and_starts_of_the_tasks_and_candidates() -> None:
    """The sizes that readers are told, one grid for all rates, and no epoch exceeded."""
    sizes = {}
    for name, task in quality.TASKS.items():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in task.model().parameters()) / 1e6
        assert task.width % 4 == 0
        assert math.log2(task.other_lr / 3e-3).is_integer()
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "stdlib": 2.3,
        "austen": 2.3,
        "large": 7.1,
        "vit": 1.2,
    }
    assert all(math.log2(candidate.start / 1e-3).is_integer() for candidate in quality.CANDIDATES.values())
    assert len({candidate.colour for candidate in quality.CANDIDATES.values()}) == len(quality.CANDIDATES)
    tasks = quality.TASKS
    assert tasks["vit"].steps * tasks["vit"].batch_size <= 60_000 - tasks["vit"].val_size  # one pass


def test_a_run_that_would_meet_a_sample_twice_is_refused(tiny: Any) -> None:
    with pytest.raises(AssertionError, match="met twice"):
        quality.train(replace(tiny, steps=10**6), quality.CANDIDATES["adamw"], (1e-3, 1e-3, 0.9), 0, "sweep")


@pytest.mark.parametrize("loss", [lambda x: x * math.nan, lambda x: (x * 0).sqrt()], ids=["loss", "gradient"])
def test_a_diverged_run_ends_and_is_kept_as_null(
    tiny: Any, loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = lambda self, model, batch: {"loss": loss(model.lm_head.weight.square().sum())}  # noqa: E731
    monkeypatch.setattr(quality.NextByte, "measures", diverged)
    results = tmp_path / "results.json"
    assert (
        quality.measured(results, tiny, quality.CANDIDATES["adamw"], (1e-3, 1e-3, 0.9), 0, "final")["val_loss"] is None
    )
    (kept,) = json.loads(results.read_text())
    assert kept["online_loss"] is None
    assert kept["curve"] == []


def test_runs_of_other_lengths_and_tasks_are_kept_apart(tiny: Any, tmp_path: Path) -> None:
    results, adamw, best = tmp_path / "results.json", quality.CANDIDATES["adamw"], (2e-3, 1.2e-2, 0.9)
    for entry in (
        row("adamw", 100, "sweep", steps=1, online_loss=0.0, lr=64.0),
        row("adamw", 100, "sweep", steps=4, online_loss=0.0, lr=64.0),
        row("adamw", 100, "sweep", steps=3, online_loss=0.0, task="vit"),
        row("adamw", 0, "final", steps=4),
        row("adamw", 0, "final", steps=3, task="vit"),
    ):
        quality.append(results, entry)
    kept = quality.read(results)
    assert quality.searched(kept, tiny, "adamw") == []
    made = quality.measured(results, tiny, adamw, best, 100, "sweep")
    assert (made["task"], made["steps"]) == ("stdlib", 3)
    assert made["online_loss"] > 0
    rows = quality.read(results)
    assert [r for r in rows if r not in kept] == [made]
    assert quality.searched(rows, tiny, "adamw") == [made]
    assert quality.final_rows(rows, tiny) == {}


def test_a_failing_optimiser_stops_no_other_and_missing_data_stop_all(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(results: Path, task: Any, candidate: Any, known: Any) -> None:
        if candidate.name == "galore":
            raise RuntimeError("a bug")
        print(f"{candidate.name} swept on {task.name}")

    monkeypatch.setattr(quality, "sweep", sweep)
    arguments = ["sweep", "--results", str(tmp_path / "results.json"), "--task", "b", "--only", "galore", "adamw"]
    assert quality.main(arguments, {"a": tiny, "b": tiny}) == 1
    said = capsys.readouterr()
    assert "adamw swept on stdlib" in said.out
    assert "a bug" in said.err
    nowhere = replace(tiny, corpus=partial(ByteText, [str(tmp_path / "missing")]))
    with pytest.raises(UserError, match="does not exist"):
        quality.main(arguments, {"b": nowhere})
    assert "swept" not in capsys.readouterr().out


def test_the_search_walks_to_where_no_neighbour_is_better_also_along_a_diagonal_valley() -> None:
    asked: list[tuple[float, float, float]] = []

    def loss(point: tuple[float, float, float]) -> float:
        asked.append(point)
        lr, other, forgets = (math.log2(one) for one in (*point[:2], 1 - point[2]))
        return (other - 1) ** 2 + 10 * (lr - forgets - 2) ** 2 + (forgets + 3) ** 2

    # The best of lr is four times what is forgotten: each alone is better nowhere along the valley.
    assert quality.search(loss, (2.0, 1.0, 0.5)) == (0.5, 2.0, 0.875)
    assert set(asked) >= quality.beside((0.5, 2.0, 0.875))


def test_runs_of_another_length_begin_at_the_best_point_of_the_table_and_search_both_rates_together(
    tiny: Any, tmp_path: Path, trained: list[Any]
) -> None:
    results = tmp_path / "results.json"
    quality.append(results, row("adamw", 100, "sweep", steps=3, lr=4e-3, momentum=0.8))
    arguments = ["final", "--only", "adamw", "--steps", "5", "--seeds", "7", "--results", str(results)]
    assert quality.main(arguments, {tiny.name: tiny}) == 0
    (last,) = [run for run in trained if run[3] == "final"]
    assert last[2] == 7
    searched = [run[1] for run in trained if run[3] == "sweep"]
    assert (4e-3, 1.2e-2, 0.8) in searched
    assert {momentum for *_, momentum in searched} == {0.8}
    best = last[1][0]
    assert {lr for lr, *_ in searched} >= {best / 2, best, 2 * best}
    assert {round(other / lr, 6) for lr, other, _ in searched} == {3.0}
    assert {r["steps"] for r in quality.read(results)} == {3, 5}


def test_those_with_almost_no_state_keep_a_twentieth_of_adamws() -> None:
    task, kept = quality.TASKS["stdlib"], {}
    for name in ("adamw", *quality.TINY):
        model = task.model()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        (optimizer,) = quality.optimizers(quality.CANDIDATES[name], task, model, (1e-3, 1e-3, 0.9))
        optimizer.step()
        kept[name] = quality.state_bytes(optimizer)
    assert max(kept[name] for name in quality.TINY) <= 0.05 * kept["adamw"]


def test_times_of_steps_are_kept_by_task_and_leave_other_tasks(tiny: Any, tmp_path: Path) -> None:
    results, file = tmp_path / "results.json", tmp_path / "results_steps.json"
    file.write_text('{"vit": {"ms": {"adamw": 1.0}}}')
    arguments = ["time", "--only", "adamw", "factored_muon", "--rounds", "2", "--results", str(results)]
    assert quality.main(arguments, {tiny.name: tiny}) == 0
    known = json.loads(file.read_text())
    assert known["vit"] == {"ms": {"adamw": 1.0}}
    assert list(known["stdlib"]["ms"]) == ["adamw", "factored_muon"]
    assert min(known["stdlib"]["ms"].values()) > 0
    assert known["stdlib"]["rounds"] == 2
    assert not results.exists()


def test_neighbours_are_a_factor_of_two_away_and_never_below_no_momentum() -> None:
    assert quality.beside((1e-3, 0.01, 0.9)) == {
        (2e-3, 0.01, 0.9), (5e-4, 0.01, 0.9), (1e-3, 0.02, 0.9), (1e-3, 0.005, 0.9), (1e-3, 0.01, 0.8),
        (1e-3, 0.01, 0.95), (2e-3, 0.01, 0.8), (5e-4, 0.01, 0.95),
    }  # fmt: skip
    assert (1e-3, 0.01, 0.0) in quality.beside((1e-3, 0.01, 0.2))


def test_no_momentum_of_the_search_is_below_zero() -> None:
    assert [quality.kept(share) for share in (0.05, 0.1, 0.2, 1.0, 1.6)] == [0.95, 0.9, 0.8, 0.0, 0.0]


def test_a_search_starts_where_candidate_and_task_say_and_on_its_own_seed(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train(task: Any, candidate: Any, point: tuple[float, ...], seed: int, stage: str) -> dict[str, Any]:
        asked.append(point)
        assert (seed, stage) == (100, "sweep")
        lr, other_lr, momentum = point
        loss = abs(math.log2(lr / 1e-3)) + abs(math.log2(other_lr / 9.6e-2)) + abs(momentum - 0.9)
        kept = {"lr": lr, "other_lr": other_lr, "momentum": momentum}
        return row("adamw", seed, stage, **kept, steps=3, online_loss=loss, wall_s=0.0)

    monkeypatch.setattr(quality, "train", train)
    assert quality.sweep(tmp_path / "results.json", tiny, quality.CANDIDATES["adamw"]) == (1e-3, 9.6e-2, 0.9)
    assert asked[:3] == [(2e-3, 4.8e-2, 0.9), (1e-3, 4.8e-2, 0.9), (5e-4, 4.8e-2, 0.9)]
    assert asked[3] == (1e-3, 9.6e-2, 0.9)
    assert set(asked[4:]) == quality.beside((1e-3, 9.6e-2, 0.9)) - {(1e-3, 4.8e-2, 0.9)}
    assert len(asked) == len(set(asked))


def test_momentum_is_that_of_the_matrices_alone_where_it_is_an_argument(tiny: Any) -> None:
    """And the first beta of everything elsewhere."""
    torch.manual_seed(0)
    muon, rest = quality.optimizers(quality.CANDIDATES["muon"], tiny, tiny.model(), (1e-3, 1e-2, 0.8))
    assert {group["momentum"] for group in muon.param_groups} == {0.8}
    assert {group["betas"] for group in rest.param_groups} == {(0.9, 0.95)}
    for name in ("adamw", "low_rank"):
        (together,) = quality.optimizers(quality.CANDIDATES[name], tiny, tiny.model(), (1e-3, 1e-2, 0.8))
        assert {group["betas"] for group in together.param_groups} == {(0.8, 0.95)}
    (trion,) = quality.optimizers(quality.CANDIDATES["trion"], tiny, tiny.model(), (1e-3, 1e-2, 0.8))
    assert trion.rule.residual.kept == 0.8


def test_the_online_loss_is_that_of_the_last_fifth(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = count(1)

    def measures(self: Any, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": model.lm_head.weight.sum() * 0 + next(steps)}

    monkeypatch.setattr(quality.NextByte, "measures", measures)
    result = quality.train(replace(tiny, steps=10), quality.CANDIDATES["adamw"], (1e-3, 1e-3, 0.9), 0, "sweep")
    assert result["online_loss"] == (9 + 10) / 2


def test_an_optimiser_that_diverges_everywhere_is_named(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "train", lambda task, candidate, point, seed, stage: diverged(*point))

    def diverged(lr: float, other_lr: float, momentum: float) -> dict[str, Any]:
        point = {"lr": lr, "other_lr": other_lr, "momentum": momentum}
        return row("fira", 100, "sweep", **point, steps=3, online_loss=None, wall_s=0.0)

    with pytest.raises(UserError, match=r"fira diverged at every rate from 0\.016 down; lower its start"):
        quality.sweep(tmp_path / "results.json", tiny, quality.CANDIDATES["fira"])


@pytest.mark.sweep
def test_the_recorded_searches_are_those_that_would_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """All points that the search of a row asks for are in the results, which nothing is added to."""
    monkeypatch.setattr(quality, "train", None)
    rows, shown = quality.read(quality.RESULTS), 0
    for task in quality.TASKS.values():
        for name, runs in quality.final_rows(rows, task).items():
            swept = quality.searched(rows, task, name)
            assert quality.sweep(quality.RESULTS, task, quality.CANDIDATES[name]) == quality.best_point(swept)
            assert quality.extent(swept).endswith(f" runs of {task.steps} steps, no neighbour is better")
            assert [r["seed"] for r in runs] == [0, 1, 2]
            shown += 1
    assert shown >= 20


def test_a_search_says_whether_all_neighbours_of_its_best_point_were_tried() -> None:
    centre = row("fira", 100, "sweep")
    near = [
        row("fira", 100, "sweep", lr=lr, other_lr=other, momentum=momentum, online_loss=None)
        for lr, other, momentum in sorted(quality.beside((centre["lr"], centre["other_lr"], centre["momentum"])))
    ]
    assert quality.extent([centre, *near]) == "9 runs of 300 steps, no neighbour is better"
    for i in range(8):
        some = near[:i] + near[i + 1 :]
        assert quality.extent([centre, *some]) == "8 runs of 300 steps, not all neighbours were tried"


def test_the_table_compares_seed_by_seed_with_adamw_and_muon() -> None:
    task = quality.TASKS["stdlib"]
    rows = [
        row("adamw", 100, "sweep"),
        row("adamw", 100, "sweep", lr=4e-3, online_loss=2.5),
        row("muon", 100, "sweep"),
        row("fira", 100, "sweep"),
        row("apollo", 100, "sweep"),
        final("adamw", 0, 1.7, 4 * 2**20, 100.0, [[5, 1.0, 0.5, 1.9], [10, 2.0, 1.0, 1.7]]),
        final("adamw", 1, 1.8, 4 * 2**20, 100.0, [[5, 1.0, 0.5, 1.9], [10, 2.0, 1.0, 1.8]]),
        final("adamw", 1, 0.0, 4 * 2**20, 100.0, [[10, 9.0, 9.0, 0.0]]) | {"lr": 4e-3},  # not the best of the sweep
        final("adamw", 1, 0.0, 4 * 2**20, 100.0, [[10, 9.0, 9.0, 0.0]]) | {"steps": 100},
        final("muon", 1, 1.65, 2**21, 110.0, [[10, 2.2, 1.1, 1.65]]),
        final("fira", 0, 1.6, 2**20, 120.0, [[5, 1.0, 0.5, 1.8], [10, 3.0, 1.5, 1.6]]),
        final("fira", 1, 1.9, 2**20, 130.0, [[5, 1.0, 0.5, 2.0], [10, 3.0, 1.5, 1.9]]),
        final("apollo", 0, 1.9, 2**19, 90.0, [[10, 1.8, 0.9, 1.9]]),
    ]
    lines = quality.table(rows, task).splitlines()
    end = " | 1 runs of 300 steps, not all neighbours were tried |"
    assert lines == [
        "| optimiser | lr / other lr / momentum | validation loss, nats | minus AdamW's | minus Muon's "
        "| state, MiB (ratio) | step, wall ms (ratio) | s to AdamW's loss | search |",
        "|---|---|---|---|---|---|---|---|---|",
        "| adamw | 0.002 / 0.012 / 0.9 | 1.7500 |  | +0.1500 (+0.1500 to +0.1500) | 4.00 (1.00x) | 100.0 (1.00x) "
        "| 2.0 | 2 runs of 300 steps, not all neighbours were tried |",
        "| **muon** | 0.002 / 0.012 / 0.9 | 1.6500 | -0.1500 (-0.1500 to -0.1500) |  | 2.00 (0.50x) | 110.0 (1.10x) "
        "| 2.2" + end,
        "| **fira** | 0.002 / 0.012 / 0.9 | 1.7500 | +0.0000 (-0.1000 to +0.1000) | +0.2500 (+0.2500 to +0.2500) "
        "| 1.00 (0.25x) | 125.0 (1.25x) | 2.0 (1 of 2 seeds)" + end,
        "| **apollo** | 0.002 / 0.012 / 0.9 | 1.9000 | +0.2000 (+0.2000 to +0.2000) |  | 0.50 (0.12x) | 90.0 (0.90x) "
        "| never" + end,
    ]
    assert "| 62.5 (1.25x) | 1.0 (1 of 2 seeds) |" in quality.table(rows, task, "cpu")
    without = quality.table([r for r in rows if r["optimizer"] != "adamw"], task).splitlines()[2:]
    assert without[-1] == "| **apollo** | 0.002 / 0.012 / 0.9 | 1.9000 |  |  | 0.50 | 90.0 | " + end
    accurate = [r | {"val_accuracy": 0.5 + r["seed"] / 4} if r["stage"] == "final" else r for r in rows]
    assert "| 1.7500 | 0.6250 |  |" in quality.table(accurate, task)
    accurate[-1]["val_accuracy"] = None
    assert "| 1.9000 |  | +0.2000" in quality.table(accurate, task)
    assert "| validation loss, nats | accuracy | minus AdamW's |" in quality.table(accurate, task)


def test_nobody_is_timed_to_the_end_of_a_run_that_diverged() -> None:
    adamw, fira = (
        [final(name, seed, loss, 2**20, 100.0, [[5, 1.0, 0.5, 1.9], [10, 2.0, 1.0, loss]]) for seed in range(2)]
        for name, loss in (("adamw", 1.7), ("fira", 1.6))
    )
    adamw[0] |= {"val_loss": None, "curve": []}
    assert quality.when(fira, adamw[:1], "wall") == ""
    assert quality.when(fira, adamw, "wall") == quality.when(fira[1:], adamw[1:], "wall") == "1.7"


@pytest.mark.parametrize("damaged", ["", '[{"task": "stdl', "null", "[1]", '[{"task": "stdlib"}]'])
def test_a_damaged_results_file_is_named_before_anything_is_trained(damaged: str, tmp_path: Path, tiny: Any) -> None:
    results = tmp_path / "results.json"
    results.write_text(damaged)
    for stage in ("sweep", "table"):
        with pytest.raises(UserError, match=r"results.json is damaged .*restore it, or move it away"):
            quality.main([stage, "--results", str(results)], {tiny.name: tiny})
    assert results.read_text() == damaged


def test_bold_means_that_no_other_is_better_for_as_little_state() -> None:
    state = {
        "a": (1.0, 4 * 2**20),
        "b": (1.1, 4 * 2**20 - 100),
        "c": (1.1, 2**20),
        "d": (2.0, 2**20),
        "e": (0.9, 2**23),
    }
    finals = {name: [row(name, 0, "final", val_loss=loss, state_bytes=kept)] for name, (loss, kept) in state.items()}
    assert quality.frontier(finals) == {"a", "c", "e"}  # a hundred bytes are not what b has over a


def test_the_table_command_draws_next_to_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    for entry in (row("adamw", 100, "sweep"), final("adamw", 0, 1.7, 2**20, 100.0, [[10, 2.0, 1.0, 1.7]])):
        quality.append(results, entry | {"task": "austen"})
    assert quality.main(["table", "--results", str(results), "--task", "austen"]) == 0
    assert "| **adamw** |" in capsys.readouterr().out
    assert (tmp_path / "results_austen.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no final run of stdlib to draw"):
        quality.main(["table", "--results", str(results)])


def test_names_keep_their_distance_and_stay_below_the_top() -> None:
    heights = quality.spread([0.1, 0.1, 0.5, 0.97, 0.98, 0.99], gap=0.1)
    assert all(above - below >= 0.1 - 1e-12 for below, above in pairwise(heights))
    assert heights == pytest.approx([0.1, 0.2, 0.5, 0.8, 0.9, 1.0])
