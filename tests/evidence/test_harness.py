import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.runs

EVIDENCE = Path(__file__).resolve().parents[2] / "evidence"

TOY = '''"""A toy system: what the harness records."""

SOUND = {"floor": {0: 0.0, 1: 0.1}, "ceiling": 9.0, "arms": ("ours",)}


def test_measures(evidence):
    evidence.figure("accuracy", 0.5, seed=0, unit="%")
    evidence.figure("accuracy", 0.7, seed=1, unit="%")
    rates = evidence.search({"ours": lambda rate: -abs(rate - 0.01)}, (0.005, 0.01, 0.02))
    assert rates == {"ours": 0.01}
    evidence.gate("ours", {0: 0.5, 1: 0.7}, 0.1, by=0.2)
    assert evidence.claim("gain", {0: 1.9, 1: 2.0}, at_least=1.5, unit="points", **SOUND).word == "held"
    assert evidence.claim("cost", 2.0, at_most=1.6, floor=2, ceiling=0, arms=("ours",)).word == "not held"
    assert evidence.claim("loss", {0: float("nan"), 1: 1.0}, at_least=0.5, **SOUND).word == "not held"
    assert evidence.claim("earlier", {0: 2.0, 1: 2.1}, at_least=0.5).word == "could not tell"
    evidence.note("Chosen on seed 100.")
    evidence.note("Rates", {"turned": {"LoRA": 0.003}, ("full", 0): (0.01, None)})
    evidence.figure("after the claim that failed", 3)


def test_stands_by_itself(evidence):
    evidence.claim("exact", 0.0, at_most=0.0, floor=1.0, ceiling=0.0, arms=())
'''

BROKEN = '''"""Stops in the middle."""


def test_measures(evidence):
    evidence.figure("accuracy", 0.5, seed=0)
    raise RuntimeError("power cut")
'''


BROKEN_FIRST = (
    BROKEN
    + """

def test_stands_by_itself(evidence):
    evidence.claim("exact", 0.0, at_most=0.0)
"""
)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that holds the harness and two toy systems."""
    root = tmp_path_factory.mktemp("house")
    (root / "evidence").mkdir()
    pages = (
        "build_docs.py",
        "methods_page.py",
        "catalogue.py",
        "claims.py",
        "verdicts.py",
        "surroundings.py",
        "reproduce.py",
        "systems.yaml",
        "negatives.yaml",
    )
    for name in ("conftest.py", "recorder.py", *pages):
        shutil.copy(EVIDENCE / name, root / "evidence" / name)
    (root / "evidence" / "test_77_toy.py").write_text(TOY)
    (root / "evidence" / "results").mkdir()
    (root / "evidence" / "results" / "77_toy.png").touch()
    (root / "evidence" / "test_broken.py").write_text(BROKEN)
    (root / "evidence" / "test_broken_first.py").write_text(BROKEN_FIRST)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    return root


def run(house: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "evidence", *args]
    return subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toy(house: Path) -> tuple[subprocess.CompletedProcess[str], dict]:
    done = run(house, "--system", "77")
    return done, json.loads((house / "evidence" / "results" / "77_toy.json").read_text())


def test_a_claim_that_does_not_hold_fails_its_test_alone_and_names_the_figures(toy: tuple) -> None:
    done, _ = toy
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "cost: 2.0 , wanted at_most 1.6; not held" in done.stdout
    assert "loss: None , wanted at_least 0.5, per seed {'0': None, '1': 1.0}; not held" in done.stdout
    assert "earlier: 2.05 , wanted at_least 0.5, per seed {'0': 2.0, '1': 2.1}; could not tell: no floor" in done.stdout
    assert "gain" not in done.stdout.split("recorded, and not held:")[1].split("=====")[0]


def test_every_figure_is_recorded_also_those_that_fall_short(toy: tuple) -> None:
    _, record = toy
    assert record["title"] == "A toy system: what the harness records."
    assert record["command"] == "make evidence SYSTEM=77"
    assert record["complete"]
    assert [(c["name"], c["value"], c["floor"], c["ceiling"], c["arms"]) for c in record["claims"]] == [
        ("gain", 1.95, 0.05, 9.0, ["ours"]),
        ("cost", 2.0, 2.0, 0.0, ["ours"]),
        ("loss", None, 0.05, 9.0, ["ours"]),
        ("earlier", 2.05, None, None, None),
        ("exact", 0.0, 1.0, 0.0, []),
    ]
    assert record["claims"][0]["per_seed"] == {"0": 1.9, "1": 2.0}
    assert record["gates"] == {"ours": {"by": 0.2, "gains": {"0": 0.4, "1": pytest.approx(0.6)}, "unit": ""}}
    assert record["searches"][0]["tried"]["ours"].keys() == {"0.005", "0.01", "0.02"}
    assert [(f["value"], f["seed"]) for f in record["figures"]] == [(0.5, 0), (0.7, 1), (3.0, None)]


def test_the_record_says_what_was_measured_on_what(toy: tuple) -> None:
    _, record = toy
    assert record["versions"]["torch"]
    assert record["versions"]["lightspan"]
    for key in ("date", "python", "cpu", "cores"):
        assert record[key], key
    assert {"commit", "uncommitted_changes", "threads"} <= record.keys()


def test_a_system_picks_its_file_alone_and_an_unknown_one_is_refused(house: Path, toy: tuple) -> None:
    assert not (house / "evidence" / "results" / "broken.json").exists()
    done = run(house, "--system", "7")
    assert done.returncode == 4
    assert (
        "--system 7 matches no file test_7*.py in evidence/; there are: 77_toy, broken, broken_first"
        in done.stderr + done.stdout
    )


def test_a_run_that_stops_in_the_middle_leaves_its_figures_marked_incomplete(house: Path, toy: tuple) -> None:
    done = run(house, "--system", "broken")
    assert "power cut" in done.stdout
    record = json.loads((house / "evidence" / "results" / "broken.json").read_text())
    assert not record["complete"]
    assert record["figures"][0]["value"] == 0.5
    assert "stopped before its end" in (house / "docs" / "evidence" / "broken.md").read_text()
    assert "| **0 of 0, incomplete** |" in (house / "docs" / "evidence.md").read_text()


@pytest.mark.parametrize("chosen", [(), ("-k", "test_stands_by_itself")])
def test_a_file_is_complete_only_when_all_of_its_tests_have_ended(house: Path, toy: tuple, chosen: tuple) -> None:
    run(house, "--system", "broken_first", *chosen)
    record = json.loads((house / "evidence" / "results" / "broken_first.json").read_text())
    assert [claim["name"] for claim in record["claims"]] == ["exact"]
    assert not record["complete"]


def test_its_page_holds_every_claim_with_seeds_mean_margin_and_verdict(house: Path, toy: tuple) -> None:
    page = (house / "docs" / "evidence" / "77_toy.md").read_text()
    assert "| gain | 0: 1.9, 1: 2 | 1.95 points | 1.315 to 2.585 | level | >= 1.5 | 0.05 | 9 | held |" in page
    assert "| cost |  | 2 |  | level | <= 1.6 | 2 | 0 | not held: Misses the margin by 0.4; the" in page
    assert "| loss | 0: not finite, 1: 1 | not finite |  | level | >= 0.5 | 0.05 | 9 | not held |" in page
    assert "| earlier | 0: 2, 1: 2.1 | 2.05 | 1.415 to 2.685 | level | >= 0.5 |  |  | could not tell: no floor" in page
    assert "| ours | 0: 0.4, 1: 0.6 | 0.2 | yes |" in page
    assert "| ours | 0.005: -0.005, 0.01: 0, 0.02: -0.01 | 0.01 |" in page
    assert "| accuracy | 0: 0.5, 1: 0.7 | 0.6 % |" in page
    assert "- Chosen on seed 100.\n- Rates: turned (LoRA: 0.003), full 0: (0.01, none)." in page
    assert "![A toy system: what the harness records.](../../evidence/results/77_toy.png)" in page
    assert "`make evidence SYSTEM=77`" in page


def reproduce(house: Path, row: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "evidence/reproduce.py", row, "--out", str(house / "again"), *more]
    return subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)


def test_a_record_is_measured_again_and_compared_with_its_spread(house: Path, toy: tuple) -> None:
    results, pages = house / "evidence" / "results" / "77_toy.json", house / "docs" / "evidence.md"
    stored, shown = json.loads(results.read_text()), pages.read_text()
    done = reproduce(house, "77")
    assert done.returncode == 0, done.stderr
    assert "A toy system: what the harness records." in done.stdout
    assert "inside   gain: now 1.95, stored 1.9 to 2\n" in done.stdout
    assert "inside   loss: now not finite, stored not finite\n" in done.stdout
    assert "5 of 5 figures lie within the stored spread" in done.stdout
    gain, cost = stored["claims"][:2]
    gain["per_seed"], cost["value"] = {"0": 2.1, "1": 2.2}, 2.001
    moved = stored | {"claims": [gain, cost, *stored["claims"][2:]]}
    results.write_text(json.dumps(moved))
    done = reproduce(house, "77_toy")
    results.write_text(json.dumps(stored | {"claims": toy[1]["claims"]}))
    assert done.returncode == 1
    assert "OUTSIDE  gain: now 1.95, stored 2.1 to 2.2\n" in done.stdout
    assert "OUTSIDE  cost: now 2, stored 2.001\n" in done.stdout
    assert pages.read_text() == shown


def test_what_a_measurement_lacks_is_named_before_it_starts(house: Path, toy: tuple) -> None:
    file = house / "evidence" / "test_77_toy.py"
    file.write_text(f'NEEDS = ("json", "no_such_package", "R/no_such_data", "/no/such/folder")\n{TOY}')
    done = reproduce(house, "77")
    file.write_text(TOY)
    assert done.returncode == 2
    assert "needs no_such_package, R/no_such_data, /no/such/folder, which" in done.stderr
    for row, said in (("76", "there are"), ("77_tyo", "did you mean 77_toy?")):
        done = reproduce(house, row)
        assert done.returncode == 2
        assert f"ROW={row} is unknown; {said}" in done.stderr


def test_a_claim_without_a_margin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVIDENCE)
    from recorder import Recorder

    recorder = Recorder("toy", "", tmp_path / "toy.json")
    with pytest.raises(ValueError, match="claim 'gain' needs exactly one of at_least= and at_most="):
        recorder.claim("gain", 1.0)
    with pytest.raises(ValueError, match="claim 'gain' has no figures"):
        recorder.claim("gain", {}, at_least=0.0)
