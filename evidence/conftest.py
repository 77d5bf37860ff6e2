"""The `evidence` fixture, `--system`, and the pages that are built anew when a run ends; see evidence/README.md."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # evidence/ is a folder of tests, not a package

from build_docs import build  # noqa: E402
from recorder import Recorder, unmet  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--system", help="run one system's evidence: its number (42) or its name (quickstart)")
    parser.addoption("--results", type=Path, help="keep records in this folder, and leave the pages as they are")


def system_of(path: Path) -> str:
    return path.stem.removeprefix("test_")


RECORDING = pytest.StashKey[dict[Path, set[str]]]()


@pytest.hookimpl(tryfirst=True)  # before -k and its like leave some out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = config.stash.setdefault(RECORDING, {})
    for item in items:
        if "evidence" in getattr(item, "fixturenames", ()):
            tests.setdefault(item.path, set()).add(item.nodeid)
    wanted = config.getoption("--system")
    if wanted is None:
        return
    chosen = [i for i in items if wanted in (system_of(i.path), system_of(i.path).split("_")[0])]
    if not chosen:
        known = ", ".join(sorted(system_of(path) for path in HERE.glob("test_*.py"))) or "none"
        raise pytest.UsageError(f"--system {wanted} matches no file test_{wanted}*.py in evidence/; there are: {known}")
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


@pytest.fixture(scope="module")
def evidence(request: pytest.FixtureRequest) -> Recorder:
    """Records figures and claims of this file; see evidence/README.md."""
    title = (request.module.__doc__ or "").strip().split("\n")[0]
    system = system_of(request.path)
    folder = request.config.getoption("--results") or HERE / "results"
    return Recorder(system, title, folder / f"{system}.json")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    recorder = pyfuncitem.funcargs.get("evidence")
    if not isinstance(recorder, Recorder):
        return (yield)
    before = len(recorder.record["claims"])
    try:
        result = yield
        recorder.ended.add(pyfuncitem.nodeid)
    finally:
        recorder.write(complete=recorder.ended == pyfuncitem.config.stash[RECORDING][pyfuncitem.path])
    fallen_short = unmet(recorder.record, before)
    if fallen_short:
        pytest.fail(f"recorded, and not held:\n{fallen_short}", pytrace=False)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--results") is None and (HERE / "results").is_dir():
        build(HERE.parent)
