"""What tests cost in processor time, as a report that means the same on a slow machine: no test fails for its cost.

A test's cost is that of its fixtures, its body and the processes that it starts and waits for. It is compared with what
its kind may take, times the slowness of the machine: the ratio of a fixed piece of work, measured once in the same
process, to what that work takes on the machine that the limits were set on.
"""

import functools
import resource
import time
from collections.abc import Iterator

import pytest
import rank_processes
import torch

LIMITS_S = {"ranks": 90, "runs": 60, "sweep": 30, "pretrained": 30, "aot": 120}
"""Seconds that a test of each long kind should take at most, by its marker."""
UNMARKED_S = 3
YARDSTICK_S = 0.025
"""What `yardstick` took where the limits were set."""
PROPERTY, START = "processor_s", pytest.StashKey[float]()
ROWS = 30


def processor_s() -> float:
    """Of this process and of those that it has started and waited for. Unlike a clock it is independent of others."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + rank_processes.processor_s()


def yardstick() -> None:
    """Python and small tensors, of which the tests consist."""
    matrix, total = torch.eye(64), 0
    for number in range(2_500):
        matrix = matrix @ matrix
        total += sum(range(number % 256))


@functools.cache
def slowness() -> float:
    """Of this machine, as a factor; the fastest of three rounds."""
    rounds = []
    for _ in range(3):
        before_s = time.process_time()
        yardstick()
        rounds.append(time.process_time() - before_s)
    return min(rounds) / YARDSTICK_S


def kind_of(item: pytest.Item) -> str | None:
    """Of several kinds the one that may take longest."""
    return max((n for n in LIMITS_S if item.get_closest_marker(n)), key=LIMITS_S.__getitem__, default=None)


class Costs:
    """A plugin: in each process that runs tests it measures them, and where the summary is printed it lists them."""

    def __init__(self) -> None:
        self.over: dict[str, tuple[float, str, float]] = {}  # test -> factor over its limit, kind, seconds

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        slowness()
        item.stash[START] = processor_s()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        if call.when == "teardown":
            kind, spent_s = kind_of(item), processor_s() - item.stash[START]
            factor = spent_s / ((LIMITS_S[kind] if kind else UNMARKED_S) * slowness())
            item.user_properties.append((PROPERTY, [factor, kind or "no mark", spent_s]))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cost = dict(report.user_properties).get(PROPERTY)
        if report.when == "teardown" and cost is not None and cost[0] > 1:
            self.over[report.nodeid] = tuple(cost)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.over:
            return
        terminalreporter.section("tests that cost more than their kind should (no failure)")
        rows = sorted(self.over.items(), key=lambda row: -row[1][0])
        for name, (factor, kind, spent_s) in rows[:ROWS]:
            terminalreporter.line(f"{factor:6.1f} x  {spent_s:6.1f} s  {kind:10}  {name}")
        if len(rows) > ROWS:
            terminalreporter.line(f"and {len(rows) - ROWS} more")
