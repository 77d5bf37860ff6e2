"""What tests/conftest.py does: costs are told and fail nothing, long kinds are left to `make test-all`, and no skip is
passed over where everything is installed.
"""

import contextlib
import os
from itertools import combinations
from pathlib import Path

import pytest
import rank_processes
from pairwise import covering

CASES = """
import costs
import pytest

costs.UNMARKED_S, costs.LIMITS_S["runs"] = 0.3, 1e6  # the first failure of a process imports what prints it

def work():
    for _ in range(30):
        costs.yardstick()

def test_is_quick():
    pass

def test_is_dear():
    work()

@pytest.mark.runs
def test_is_dear_and_marked():
    work()

@pytest.mark.runs
def test_is_another_of_its_kind():
    pass

@pytest.mark.sweep
def test_is_the_first_of_its_kind():
    pass

@pytest.mark.sweep
@pytest.mark.smoke
def test_is_the_sample_of_its_kind():
    pass

@pytest.mark.sample(2)
@pytest.mark.parametrize("number", range(5))
def test_is_one_of_many(number):
    pass

@pytest.fixture(scope="module")
def dear():
    work()

def test_has_a_dear_fixture(dear):
    pass

def test_lacks_a_browser():
    pytest.skip("no browser")

@pytest.mark.skipif(True, reason="shellcheck is not installed")
def test_lacks_shellcheck():
    pass

def test_lacks_a_gpu():
    pytest.skip("needs CUDA")

@pytest.mark.xfail
def test_is_known_to_fail():
    assert False
"""


def verdicts(folder: Path, *flags: str) -> tuple[dict[str, str], str]:
    """What became of each case, and all that was said."""
    (folder / "test_cases.py").write_text(CASES)
    rank_processes.start(_pytest, 1, folder, flags)
    said = (folder / SAID).read_text()
    summary = said.partition("short test summary")[2]
    lines = {line.partition("::")[2].split(" ")[0]: line for line in summary.splitlines() if "::test_" in line}
    return {name: line.split(" ")[0] for name, line in lines.items()}, said


SAID = "said.txt"


def _pytest(rank: int, folder: Path, flags: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ["LIGHTSPAN_NO_SKIP"] = "1"
    with Path(SAID).open("w") as said, contextlib.redirect_stdout(said):
        pytest.main(["-p", "conftest", "-rA", "-p", "no:cacheprovider", *flags, "."])


@pytest.mark.runs
def test_costs_fail_nothing_and_skips_that_an_installation_would_cure_do(tmp_path: Path) -> None:
    found, said = verdicts(tmp_path)
    assert found == {
        "test_is_quick": "PASSED",
        "test_is_dear": "PASSED",
        "test_is_dear_and_marked": "PASSED",
        "test_is_another_of_its_kind": "PASSED",
        "test_is_the_first_of_its_kind": "PASSED",
        "test_is_the_sample_of_its_kind": "PASSED",
        **{f"test_is_one_of_many[{number}]": "PASSED" for number in range(5)},
        "test_has_a_dear_fixture": "PASSED",
        "test_lacks_a_browser": "FAILED",
        "test_lacks_shellcheck": "ERROR",
        "test_is_known_to_fail": "XFAIL",
    }, said
    assert "1 skipped" in said
    table = said.partition("tests that cost more than their kind should")[2].partition("short test summary")[0]
    told = {line.rpartition("::")[2] for line in table.splitlines() if "::" in line}
    assert told == {"test_is_dear", "test_has_a_dear_fixture"}


@pytest.mark.runs
def test_of_each_long_kind_and_of_many_cases_a_sample_stays(tmp_path: Path) -> None:
    found, said = verdicts(tmp_path, "-m", "not long", "-k", "not lacks")
    assert {name for name in found if "kind" in name or "marked" in name or "many" in name} == {
        "test_is_dear_and_marked",
        "test_is_the_sample_of_its_kind",
        "test_is_one_of_many[0]",
        "test_is_one_of_many[2]",
    }, said
    assert "8 deselected" in said  # five of these, and three that lack something


@pytest.mark.runs
def test_what_passed_in_other_runs_is_left_out(tmp_path: Path) -> None:
    for report, chosen in {"one.xml": "quick or lacks", "another.xml": "first"}.items():
        verdicts(tmp_path, f"--junitxml={report}", "-k", chosen)
    reports = ("--except-passed=one.xml", "--except-passed=another.xml")
    found, said = verdicts(tmp_path, *reports, "-k", "quick or first or lacks or fixture")
    assert found == {
        "test_has_a_dear_fixture": "PASSED",
        "test_lacks_a_browser": "FAILED",
        "test_lacks_shellcheck": "ERROR",
    }, said


@pytest.mark.runs
def test_after_the_minutes_nothing_begins(tmp_path: Path) -> None:
    found, said = verdicts(tmp_path, "--minutes", "0", "-k", "quick")
    assert found == {"test_is_quick": "ERROR"}, said
    assert "the 0 minutes are over" in said


def test_pairwise_cases_have_every_pair_and_are_few() -> None:
    for sizes, rows in (((5, 3), 15), ((12, 2, 2), 24), ((8, 2, 2, 2), 16), ((4, 3, 3), 13)):
        cases = covering(*sizes)
        assert len(cases) <= rows
        for one, other in combinations(range(len(sizes)), 2):
            assert len({(case[one], case[other]) for case in cases}) == sizes[one] * sizes[other]
