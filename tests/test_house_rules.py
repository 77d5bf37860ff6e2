"""Who may import whom: down the table of rooms only, so a part is usable without those that are built on it.

And in tests: no clock decides whether one passes.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from import_graph import ROOT, imports, sources, statements, tree

# Room -> the rooms below it that it may use, from the ground up. The command line may use all.
MAY_USE: dict[str, set[str]] = {
    "core": set(),
    "triton_kernels": {"core"},
    "subspaces": {"core", "triton_kernels"},
    "optim": {"core", "subspaces", "triton_kernels"},
    "nn": {"core", "subspaces"},
    "objectives": {"core", "nn", "optim"},
    "adapters": {"core", "subspaces"},
    "backbones": {"core", "nn"},
    "datamodules": {"core"},
    "training": {"core", "nn", "optim"},
    "merging": {"adapters", "core", "objectives", "subspaces", "training"},
    "evaluation": {"core", "datamodules", "merging", "nn", "optim", "subspaces", "training"},
    "selection": {"core", "datamodules", "evaluation", "subspaces"},
    "callbacks": {"adapters", "core", "evaluation", "nn", "optim", "subspaces", "training"},
    "methods": {
        *("adapters", "backbones", "core", "evaluation", "merging", "nn", "objectives", "optim", "subspaces"),
        *("training", "triton_kernels"),
    },
    "recipes": set(),
}
# The typed batches are the contract between data and everything that reads it: types alone, no behaviour.
SHARED_TYPES = re.compile(r"lightspan\.datamodules\.\w+\.batch\b")
TOP = {"__init__", "__main__", "cli"}
# `lightspan` offers these at its root; each stands for the module it comes from.
AT_ROOT = {"Method": "training.method", "UserError": "core.errors", "__version__": "core"}
# Pure tensor code, usable without a trainer.
WITHOUT_LIGHTNING = ("adapters", "backbones", "core", "nn", "objectives", "optim", "subspaces", "triton_kernels")


def below(name: str) -> str:
    """`lightspan.optim.groups.f` -> `optim.groups.f`; names of the package itself -> what they stand for."""
    rest = name.removeprefix("lightspan").removeprefix(".")
    return AT_ROOT.get(rest, rest)


def room_of(name: str) -> str:
    return below(name).split(".")[0]


SOURCES = sources()


def test_the_rules_see_the_whole_house() -> None:
    rooms = {name.split(".")[0] for name, _ in SOURCES}
    assert len(SOURCES) > 40
    assert rooms == MAY_USE.keys() | TOP, "a room and the table of rooms differ"


def test_every_room_may_use_rooms_above_it_in_the_table_only() -> None:
    rooms = list(MAY_USE)
    assert all(rooms.index(used) < number for number, room in enumerate(rooms) for used in MAY_USE[room])


def test_imports_run_down_the_house_only() -> None:
    wrong = []
    for module, file in SOURCES:
        room = module.split(".")[0]
        if room not in TOP:
            allowed = {room} | MAY_USE[room]
            wrong += [
                f"{place} imports {name}; {room} may use {sorted(allowed)}"
                for place, name in imports(file)
                if name.split(".")[0] == "lightspan" and room_of(name) not in allowed and not SHARED_TYPES.match(name)
            ]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_one_another_in_a_circle() -> None:
    modules = {module for module, _ in SOURCES}

    def file_of(name: str) -> str:
        rest = below(name)
        while rest and rest not in modules:
            rest = rest.rpartition(".")[0]
        return rest

    graph = {
        module: {file_of(name) for _, name in imports(file) if name.split(".")[0] == "lightspan"} - {"", module}
        for module, file in SOURCES
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_are_absolute() -> None:
    wrong = [f"{place} imports {name}" for _, file in SOURCES for place, name in imports(file) if name.startswith(".")]
    assert not wrong, "\n".join(wrong)


def test_no_method_imports_another_method() -> None:
    methods = [file for module, file in SOURCES if module.startswith("methods.")]
    assert methods
    found = [(place, name) for file in methods for place, name in imports(file)]
    wrong = [f"{place} imports {name}" for place, name in found if name.startswith("lightspan.methods")]
    assert not wrong, "\n".join(wrong)


def test_tensor_code_never_imports_lightning() -> None:
    pure = [file for module, file in SOURCES if module.startswith(WITHOUT_LIGHTNING)]
    assert pure
    found = [(place, name) for file in pure for place, name in imports(file)]
    lightning = {"lightning", "pytorch_lightning", "lightning_fabric"}
    wrong = [f"{place} imports {name}" for place, name in found if name.split(".")[0] in lightning]
    assert not wrong, "\n".join(wrong)


def test_pictures_have_one_look() -> None:
    files = [file for _, file in SOURCES] + sorted([*ROOT.glob("evidence/*.py"), *ROOT.glob("benchmarks/*.py")])
    wrong = [
        f"{place} imports {name}; draw on a canvas of lightspan.core.drawing"
        for file in files
        for place, name in imports(file)
        if name.startswith("matplotlib.figure") and file != ROOT / "framework/core/drawing.py"
    ]
    assert not wrong, "\n".join(wrong)


REFERENCES = "the slow optimiser has the name of the fast one that is tested against it"
# Public classes that may share their name: module of the second one -> why.
NAMESAKES = {
    f"optim.reference.{file}": REFERENCES for file in ("apollo", "dct", "fira", "galore", "ldadam", "low_rank", "muon")
}


def test_a_public_class_has_its_name_to_itself() -> None:
    homes: dict[str, str] = {}
    wrong = []
    for module, file in SOURCES:
        for node in tree(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and module not in NAMESAKES:
                wrong += [f"{module}.{node.name} is also in {homes[node.name]}"] if node.name in homes else []
                homes[node.name] = module
    assert len(homes) > 300
    assert not wrong, "\n".join(wrong) + "\nName one of them by what it holds"


CLOCKS = {
    "perf_counter",
    "process_time",
    "monotonic",
    "thread_time",
    "perf_counter_ns",
    "process_time_ns",
    "monotonic_ns",
}


def reads_clock(node: ast.AST, names: frozenset[str] = frozenset()) -> bool:
    """Whether it calls a clock, `time.time` included, or has one of these names."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id in names:
            return True
        if isinstance(inner, ast.Call):
            called = ast.unparse(inner.func)
            if called.rpartition(".")[2] in CLOCKS or called == "time.time":
                return True
    return False


def timed_assertions(source: str) -> Iterator[int]:
    """Lines that assert how a clock, or a name made from one, compares with something; code in texts included."""
    if not any(f"{clock}(" in source for clock in (*CLOCKS, "time.time")):
        return
    for number, line in enumerate(source.splitlines(), 1):
        if "assert " in line.partition('"')[2] and any(f"{clock}(" in line for clock in CLOCKS):
            yield number
    for function in statements(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            measured: frozenset[str] = frozenset()
            for node in statements(function):
                if isinstance(node, ast.Assign) and reads_clock(node.value, measured):
                    measured |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                if isinstance(node, ast.Assert) and any(
                    isinstance(part, ast.Compare)
                    and isinstance(part.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
                    and reads_clock(part, measured)
                    for part in ast.walk(node.test)
                ):
                    yield node.lineno


def short_timeouts(source: str) -> Iterator[int]:
    """Lines that give a subprocess, a connection or a thread less than ten minutes to end."""
    for number, line in enumerate(source.splitlines(), 1):
        for seconds in re.findall(r"\btimeout=([0-9.]+)", line):
            if float(seconds) < 600:
                yield number


SLOW = """
def test_a():
    began = time.monotonic()
    took = time.monotonic() - began
    assert took < 3
    assert 2 * time.process_time() < 1
    run("assert time.process_time() < 0.5", timeout=60)
    while time.monotonic() < began:
        pass
    assert other < 3
"""


@pytest.mark.parametrize(("rule", "lines"), [(timed_assertions, [5, 6, 7]), (short_timeouts, [7])])
def test_no_test_fails_because_a_machine_is_slow(rule, lines) -> None:
    """A time-out guards against a hang: `waiting.HANG_S`."""
    assert sorted(rule(SLOW)) == lines
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 400
    files.remove(Path(__file__))
    wrong = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in rule(file.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_folders_of_tests_are_found_under_their_names() -> None:
    """A module of the same name beside them, as in benchmarks, hides a folder from whoever imports it first."""
    files = [*(ROOT / "tests").rglob("*.py")]
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in files if path.parent != ROOT / "tests"}
    assert len(folders) > 10
    assert not folders & {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
