"""When a claim of an evidence record holds, does not hold, or could not be told."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EVIDENCE = Path(__file__).resolve().parents[2] / "evidence"


@pytest.fixture(scope="module")
def verdicts() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVIDENCE))
        yield importlib.import_module("verdicts")


@pytest.fixture
def recorder(verdicts: ModuleType, tmp_path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVIDENCE))
        return importlib.import_module("recorder").Recorder("toy", "", tmp_path / "toy.json")


STEADY = {seed: 3.0 + 0.1 * seed for seed in range(5)}
SOUND = {"floor": -20.0, "ceiling": 9.0, "arms": ("ours", "theirs")}


def learned(recorder: Any, *arms: str) -> None:
    for arm in arms:
        recorder.gate(arm, {0: 0.9, 1: 0.8}, {0: 0.1, 1: 0.2}, by=0.5)


def judged(recorder: Any, value: Any = STEADY, name: str = "accuracy, ours minus theirs", **given: Any) -> str:
    margin = {} if "at_most" in given else {"at_least": 2.0}
    return str(recorder.claim(name, value, **{**margin, **SOUND, **given}))


def test_a_claim_holds_where_the_experiment_could_have_shown_either_answer(recorder: Any) -> None:
    learned(recorder, "ours", "theirs")
    assert judged(recorder) == "held"
    assert judged(recorder, at_least=4.0) == "not held"
    less = {seed: -value for seed, value in STEADY.items()}
    assert judged(recorder, less, "error, ours minus theirs", at_most=-2.0, floor=8.0, ceiling=-9.0) == "held"


def test_what_could_not_have_been_shown_is_not_told(recorder: Any) -> None:
    learned(recorder, "ours", "theirs")
    for missing in ("floor", "ceiling", "arms"):
        assert judged(recorder, **{missing: None}) == "could not tell: no floor, ceiling or gate was measured"
    assert judged(recorder, ceiling=1.5) == "could not tell: the ceiling, 1.5, misses it"
    assert judged(recorder, floor=2.0) == "could not tell: the floor, 2, keeps it too"
    assert judged(recorder, arms=("ours", "third")) == "could not tell: third has no gate"
    assert judged(recorder, ceiling=math.nan).startswith("could not tell")


def test_an_arm_that_did_not_learn_in_one_seed_closes_its_claims(recorder: Any) -> None:
    learned(recorder, "ours")
    recorder.gate("theirs", {0: 0.9, 1: 0.1}, {0: 0.1, 1: 0.2}, by=0.1)
    assert judged(recorder) == "could not tell: theirs did not learn"
    recorder.gate("theirs", {0: 1.0, 1: math.nan}, 2.0, by=0.5, lower_is_better=True)
    assert judged(recorder) == "could not tell: theirs did not learn"
    recorder.gate("theirs", {0: 1.0, 1: 1.2}, 2.0, by=0.5, lower_is_better=True)
    assert judged(recorder) == "held"
    with pytest.raises(ValueError, match="by"):
        recorder.gate("ours", {0: 1.0}, 0.0, by=0.0)


def test_a_mean_beyond_the_margin_with_an_interval_across_zero_needs_more_seeds(recorder: Any) -> None:
    learned(recorder, "ours", "theirs")
    assert judged(recorder, {0: 9.0, 1: -2.0, 2: 1.0}).startswith("could not tell: its interval is -11")
    assert judged(recorder, {0: 9.0}) == "could not tell: one seed has no interval"
    assert judged(recorder, 9.0) == "held"  # exact: nothing is random
    assert judged(recorder, {0: math.nan, 1: 9.0}) == "not held"


def test_the_interval_is_compared_with_equal_arms_with_the_margin_or_with_the_floor(recorder: Any) -> None:
    learned(recorder, "ours", "theirs")
    wide = {0: 0.2, 1: -0.4, 2: 0.2, 3: -0.4}  # mean -0.1, interval -0.65 to 0.45
    assert judged(recorder, wide, at_least=-0.5).startswith("could not tell")  # not much worse: the whole of it
    assert judged(recorder, wide, at_least=-0.7) == "held"
    ratio = {0: 0.7, 1: 0.8, 2: 1.0}
    name = "state, ours over theirs"
    assert judged(recorder, ratio, name, at_most=0.9, floor=1.0, ceiling=0.1).startswith("could not tell")
    assert judged(recorder, {0: 0.7, 1: 0.8, 2: 0.8}, name, at_most=0.9, floor=1.0, ceiling=0.1) == "held"
    assert judged(recorder, STEADY, "recall", at_least=2.0, floor=1.0) == "held"
    assert judged(recorder, {0: 2.0, 1: 5.0}, "recall", at_least=2.0, floor=1.0).startswith("could not tell")


def test_a_search_goes_on_outwards_for_all_arms_until_no_best_is_an_edge(recorder: Any) -> None:
    calls: dict[str, list[float]] = {"ours": [], "theirs": []}

    def peak(arm: str, at: float) -> Any:
        return lambda rate: (calls[arm].append(rate), -abs(math.log(rate / at)))[1]

    found = recorder.search({"ours": peak("ours", 0.1), "theirs": peak("theirs", 16.0)}, (0.5, 1.0, 2.0))
    assert found == {"ours": 0.125, "theirs": 16.0}
    assert calls["ours"] == calls["theirs"] == [0.5, 1.0, 2.0, 0.25, 4.0, 0.125, 8.0, 0.0625, 16.0, 32.0]
    learned(recorder, "ours", "theirs")
    assert judged(recorder) == "held"


def test_a_best_setting_at_an_edge_of_its_search_is_not_told(recorder: Any) -> None:
    learned(recorder, "ours", "theirs")
    grow = {"ours": lambda rate: rate, "theirs": lambda rate: -rate}
    recorder.search(grow, (0.5, 1.0, 2.0), rounds=0, limits=(0.5,))
    assert judged(recorder) == "could not tell: the best rate of ours is an edge"
    recorder.record["searches"].clear()
    recorder.search({"ours": lambda rate: -abs(rate - 1)}, (0.5, 1.0, 2.0))
    assert judged(recorder) == "could not tell: the rate of theirs was not searched"
    recorder.record["searches"].clear()
    recorder.search(dict.fromkeys(("ours", "theirs"), lambda rate: math.nan), (0.5, 1.0, 2.0), rounds=0)
    assert judged(recorder) == "could not tell: the best rate of ours is an edge; the best rate of theirs is an edge"


def test_a_run_that_stopped_tells_nothing(recorder: Any, verdicts: ModuleType) -> None:
    learned(recorder, "ours", "theirs")
    judged(recorder)
    (claim,) = recorder.record["claims"]
    assert verdicts.verdict(claim, recorder.record | {"complete": True}).word == "held"
    assert verdicts.verdict(claim, recorder.record) == verdicts.Verdict(
        "could not tell", "the run stopped before its end"
    )
