"""Settings of the whole suite: offline, quiet, one thread a worker, a limit for each test, and no skip unseen."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any test imports one
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import rank_processes
import torch
from hypothesis import settings

# Workers of `make test` keep the limits, and import everything first: the first test would pay for it with its 3 s.
KEEPS_LIMITS = "PYTEST_XDIST_WORKER" in os.environ
if KEEPS_LIMITS:
    import preloaded  # noqa: F401

# A shell that starts the tests in the background has Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # sums, too, come out the same on every machine

# Timings mean nothing on a shared machine, and a suite that others rely on should not draw new cases every night.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# Seconds of processor time that a test may take, by its marker; the smallest holds without one.
LIMITS_S = {"ranks": 90, "runs": 60, "sweep": 30, "pretrained": 30, "aot": 120}
UNMARKED_S = 3
# Parts of the reasons of skips that no machine for continuous integration can help.
MAY_SKIP = ("CUDA", "GPU", "Python 3.13")


def processor_s() -> float:
    """Of this process and of those that it has started and waited for. Unlike a clock it tells nothing of others."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + rank_processes.processor_s()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patience", type=float, default=1.0, help="factor on the limits of processor time of the tests")


@contextlib.contextmanager
def within_its_limit(item: pytest.Item) -> Iterator[None]:
    before_s = processor_s()
    yield
    spent_s = processor_s() - before_s
    limits_s = [limit_s for name, limit_s in LIMITS_S.items() if item.get_closest_marker(name)]
    limit_s = max(limits_s, default=UNMARKED_S) * item.config.getoption("--patience")
    if KEEPS_LIMITS and spent_s > limit_s:
        ways = " or ".join(f"@pytest.mark.{name} ({seconds} s)" for name, seconds in LIMITS_S.items())
        pytest.fail(
            f"{spent_s:.1f} s of processor time are over the limit of {limit_s:g} s; make the test or its fixture "
            f"smaller, mark it with {ways} where that is what it does, or pass --patience 3 on a slow machine",
            pytrace=False,
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with within_its_limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with within_its_limit(item):
        return (yield)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that workers end together. Workers take whole files (--dist loadfile)."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LIMITS_S)}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def no_seed_is_left() -> Iterator[None]:
    """Lightning leaves its seed in the environment, where processes that later tests start would find it."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
