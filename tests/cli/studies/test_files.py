"""sweep.json: what is written reads back, what others wrote is data, and another sweep is told apart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightspan.cli.studies.sweeps.files import Sweep, Trial, differences, read, write
from lightspan.cli.studies.sweeps.points import Choices, Range
from lightspan.core.errors import UserError

LR, BASIS = "model.init_args.optimizer.init_args.lr", "model.init_args.basis.class_path"
KEYS = {
    LR: Range(1e-3, 1e-1, True, 3),
    BASIS: Choices(("lightspan.optim.low_rank.bases.SVD", "lightspan.optim.low_rank.bases.DCT")),
}
SWEEP = Sweep("language/quickstart", ("-c", "scale/cpu2", "trainer.max_steps=3"), KEYS, seeds=(0, 7)).planned()


def test_trials_are_the_points_with_their_seeds_one_after_the_other() -> None:
    assert [trial.run for trial in SWEEP.trials[:4]] == [
        *("000-lr0.001-basisSVD-seed0", "001-lr0.001-basisSVD-seed7"),
        *("002-lr0.001-basisDCT-seed0", "003-lr0.001-basisDCT-seed7"),
    ]
    assert len(SWEEP.trials) == SWEEP.total == 3 * 2 * 2
    assert SWEEP.words(SWEEP.trials[3]) == [
        *("language/quickstart", "-c", "scale/cpu2", "trainer.max_steps=3"),
        *(f"{LR}=0.001", f"{BASIS}=lightspan.optim.low_rank.bases.DCT", "seed_everything=7"),
    ]


def test_a_sweep_over_seeds_alone_has_one_run_for_each() -> None:
    sweep = Sweep("r", (), {}, seeds=(2, 1)).planned()
    assert sweep.trials == (Trial("000-seed2", {}, 2), Trial("001-seed1", {}, 1))


def test_without_seeds_a_point_is_run_once_with_the_recipes_own() -> None:
    sweep = Sweep("r", (), {"a.b": Choices((1, 2))}).planned()
    assert sweep.trials == (Trial("000-b1", {"a.b": 1}, None), Trial("001-b2", {"a.b": 2}, None))
    assert sweep.flags(sweep.trials[0]) == ["a.b=1"]


def test_a_seed_may_have_further_keys() -> None:
    sweep = Sweep("r", (), {"a.b": Choices((1, 2))}, seeds=(7,), seed_keys=("data.seed",)).planned()
    assert sweep.flags(sweep.trials[1]) == ["a.b=2", "seed_everything=7", "data.seed=7"]


def test_folders_are_plain_names_of_bounded_length_that_differ() -> None:
    hostile = ("../../x", "a b;$(touch c)\n", "-" * 300, "é\x00", "")
    sweep = Sweep(
        "r", (), {"k": Choices(hostile), "other.k": Choices(([1, 2], {"a": 1}))}, seeds=(0, 4294967295)
    ).planned()
    names = [trial.run for trial in sweep.trials]
    assert len(set(names)) == 20
    for name in names:
        assert len(name) <= 130
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
        assert name[0].isdigit()


def test_a_key_is_called_by_as_much_of_it_as_is_needed() -> None:
    sweep = Sweep("r", (), {"a.x.lr": Choices((1, 2)), "a.y.lr": Choices((1, 2)), "a.z.class_path": Choices((1, 2))})
    assert [sweep.label(key) for key in sweep.keys] == ["x.lr", "y.lr", "z"]


@pytest.mark.parametrize(
    "sweep",
    [
        SWEEP,
        Sweep("r", (), {"k": Choices((1, "a", None, [1.5, {"b": True}]))}, metric="val/loss").planned(),
        Sweep(
            "r", ("--allow-module", "mine", "--wandb"), KEYS, "random", "val/acc", "max", (1,), ("d.seed",), 4, 9
        ).planned(),
        Sweep("r", ("--images", "my pictures", "--image-size", "64"), KEYS, "tpe", "m", "min", None, (), 5),
    ],
)
def test_what_is_written_reads_back(sweep: Sweep, tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", sweep)
    assert read(tmp_path / "new" / "folder") == sweep


def test_the_file_has_the_form_that_others_read(tmp_path: Path) -> None:
    write(tmp_path, SWEEP)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["keys"][LR] == {"log": [1e-3, 1e-1], "points": 3}
    assert found["keys"][BASIS] == {
        "values": ["lightspan.optim.low_rank.bases.SVD", "lightspan.optim.low_rank.bases.DCT"]
    }
    assert found["trials"][1] == {
        "run": "001-lr0.001-basisSVD-seed7", "seed": 7,
        "values": {LR: 1e-3, BASIS: "lightspan.optim.low_rank.bases.SVD"},
    }  # fmt: skip
    assert {key: found[key] for key in ("recipe", "method", "metric", "mode", "seeds")} == {
        "recipe": "language/quickstart", "method": "grid", "metric": None, "mode": "min", "seeds": [0, 7],
    }  # fmt: skip


def with_run(run: Any) -> dict[str, Any]:
    return {"trials": [{"run": run, "values": {}, "seed": 0}], "keys": {}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (with_run("../outside"), "is not a plain name"),
        (with_run("/tmp/x"), "is not a plain name"),
        (with_run(".hidden"), "is not a plain name"),
        (with_run(""), "is not a plain name"),
        (with_run(3), "is not a plain name"),
        ({"arguments": ["--run", "/elsewhere"]}, "'--run' does not belong to its arguments"),
        ({"arguments": ["--resume=x"]}, "does not belong to its arguments"),
        ({"arguments": ["other/recipe"]}, "does not belong to its arguments"),
        ({"arguments": "-c"}, "does not belong to its arguments"),
        ({"recipe": ""}, "recipe must be text"),
        ({"seed_keys": ["--run"]}, "'--run' is not a key"),
        ({"method": "magic"}, "method must be one of grid, random, tpe"),
        ({"mode": "up"}, "mode must be one of min, max"),
        ({"seeds": [-1]}, "seeds must be a whole number from 0 up"),
        ({"seeds": 3}, "not iterable"),
        ({"keys": {"k": {"values": [1]}}}, "a list needs at least two values"),
        ({"keys": {}}, "sets other keys than the sweep has"),
        ({"trials": 2 * SWEEP.record()["trials"]}, "two trials have one folder"),
        ({"trials": None}, "not iterable"),
    ],
)
def test_a_file_of_others_is_checked(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP.record() | changes))
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"recipe": "r"}', "\x00"])
def test_half_a_file_is_named_and_not_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json is not what `lightspan sweep` writes"):
        read(tmp_path)
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        read(tmp_path / "none")


def test_another_sweep_is_told_by_what_differs() -> None:
    assert differences(SWEEP, SWEEP) == []
    assert differences(SWEEP, replace(SWEEP, metric="val/loss", mode="max")) == []  # the runs are the same
    assert differences(SWEEP, replace(SWEEP, seeds=(0, 1))) == ["seeds: [0, 7] -> [0, 1]"]
    wider = {**KEYS, LR: Range(1e-3, 1.0, True, 3)}
    assert differences(SWEEP, replace(SWEEP, keys=wider)) == [f"{LR}: log(0.001,0.1,3) -> log(0.001,1.0,3)"]
    fewer = {LR: KEYS[LR]}
    assert differences(SWEEP, replace(SWEEP, keys=fewer)) == [
        f"{BASIS}: [lightspan.optim.low_rank.bases.SVD,lightspan.optim.low_rank.bases.DCT] -> not given"
    ]
    turned = dict(reversed(KEYS.items()))
    assert differences(SWEEP, replace(SWEEP, keys=turned)) == [f"order of the keys: {LR}, {BASIS} -> {BASIS}, {LR}"]


def test_more_points_of_random_and_tpe_go_on_with_the_same_sweep_and_fewer_do_not() -> None:
    for method in ("random", "tpe"):
        sweep = Sweep("r", (), KEYS, method, "m", points=4)
        assert differences(sweep, replace(sweep, points=6)) == []
        assert differences(sweep, replace(sweep, points=3)) == ["points: 4 -> 3"]
    assert differences(sweep, replace(sweep, metric="other")) == ["metric: m -> other"]  # tpe follows it
