"""What tests/conftest.py keeps: limits of processor time, and no skip where everything is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import time
import pytest

def work():
    until_s = time.process_time() + 0.3
    while time.process_time() < until_s:
        pass

def test_is_quick():
    pass

def test_is_slow():
    work()

@pytest.mark.runs
def test_is_slow_and_marked():
    work()

@pytest.fixture(scope="module")
def slow():
    work()

def test_has_a_slow_fixture(slow):
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


@pytest.mark.runs
def test_slow_tests_without_a_mark_and_skips_that_an_installation_would_cure_fail(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-rA", "-p", "no:cacheprovider", "--patience", "0.05", "."],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "LIGHTSPAN_NO_SKIP": "1",
            "PYTEST_XDIST_WORKER": "gw0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    said = {line.partition("::")[2].split(" ")[0]: line for line in done.stdout.splitlines() if "::test_" in line}
    verdicts = {name: line.split(" ")[0] for name, line in said.items()}
    assert verdicts == {
        "test_is_quick": "PASSED",
        "test_is_slow": "FAILED",
        "test_is_slow_and_marked": "PASSED",
        "test_has_a_slow_fixture": "ERROR",
        "test_lacks_a_browser": "FAILED",
        "test_lacks_shellcheck": "ERROR",
        "test_is_known_to_fail": "XFAIL",
    }, done.stdout
    assert "1 skipped" in done.stdout
    assert "over the limit of 0.15 s" in done.stdout
    assert "@pytest.mark.runs (60 s)" in done.stdout
