"""Settings of the whole suite: offline, quiet, one thread a worker, costs as a report, tiers, and no skip unseen."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any test imports one
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch
from costs import Costs, kind_of
from hypothesis import HealthCheck, settings

# Workers of `make test` import everything first: the first test would be charged for it.
if "PYTEST_XDIST_WORKER" in os.environ:
    import preloaded  # noqa: F401

# A shell that starts the tests in the background has Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # sums, too, come out the same on every machine

# Timings mean nothing on a shared machine, and a suite that others rely on should not draw new cases every night.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Parts of the reasons of skips that no machine for continuous integration can help.
MAY_SKIP = ("CUDA", "GPU", "Python 3.13")
STARTED_S = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the tests that have not begun after so many minutes")
    passed = "leave out what passed by this --junitxml; may be given again"
    parser.addoption("--except-passed", action="append", default=[], type=Path, metavar="REPORT", help=passed)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - STARTED_S > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes are over; `make test` runs it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    return refuse_skip((yield))


def refuse_skip(report):
    """Where LIGHTSPAN_NO_SKIP=1 is set, as .ci/run does, a test that an installation would let run fails."""
    if os.environ.get("LIGHTSPAN_NO_SKIP") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(part in reason for part in MAY_SKIP):
        report.outcome, report.longrepr = "failed", f"skipped where nothing may be skipped: {reason}"
    return report


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks `long` what `make test` leaves out. Of the tests of long kinds a sample stays: those marked `smoke`, and of
    each kind in each folder without one the first. Of the cases of a test marked `sample(n)` n stay, evenly spread.

    Files with long tests come first, so that workers end together, unless the minutes are limited: then they stay in
    the order in which they were named. Workers take whole files (--dist loadfile).
    """
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if kind := kind_of(item):
            groups.setdefault((kind, floor_of(item)), []).append(item)
        elif item.get_closest_marker("sample"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in groups.values():
        sample = [item for item in group if item.get_closest_marker("smoke")] or group[:1]
        leave_out(group, sample)
    for group in cases.values():
        leave_out(group, spread(group, group[0].get_closest_marker("sample").args[0]))
    if reports := config.getoption("--except-passed"):
        passed = set().union(*map(passed_in, reports))
        config.hook.pytest_deselected(items=[item for item in items if in_report(item) in passed])
        items[:] = [item for item in items if in_report(item) not in passed]
    if config.getoption("--minutes") is None:
        long = {item.path for group in groups.values() for item in group}
        items.sort(key=lambda item: item.path not in long)


def leave_out(group: list[pytest.Item], sample: list[pytest.Item]) -> None:
    kept = set(map(id, sample))
    for item in group:
        if id(item) not in kept:
            item.add_marker("long")


def spread(group: list[pytest.Item], number: int) -> list[pytest.Item]:
    """`number` of these, or all if there are fewer, at equal distances from the first on."""
    return [group[place * len(group) // number] for place in range(number)]


def passed_in(report: Path) -> set[tuple[str, str]]:
    """(class, name) of the tests of a JUnit report that neither failed nor were skipped."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {(case.attrib["classname"], case.attrib["name"]) for case in cases if {child.tag for child in case} <= TOLD}


TOLD = {"properties", "system-out", "system-err"}
"""What a JUnit report holds of a test besides a verdict that it did not pass."""


def in_report(item: pytest.Item) -> tuple[str, str]:
    """(class, name) of a test in a JUnit report."""
    file, _, name = item.nodeid.partition("::")
    return file.removesuffix(".py").replace("/", "."), name


def floor_of(item: pytest.Item) -> str:
    """The folder of tests/ that it is in, "" for tests/ itself."""
    below = item.path.relative_to(item.config.rootpath).parts[1:]
    return below[0] if len(below) > 1 else ""


@pytest.fixture(autouse=True)
def no_seed_is_left() -> Iterator[None]:
    """Lightning leaves its seed in the environment, where processes that later tests start would find it."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
