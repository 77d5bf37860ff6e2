"""Who may import whom: the arrows run down the table of floors only, so a part is usable without what stands on it.

And in tests: no clock decides whether one passes.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_graph import ROOT, imports, sources, statements, tree

# What everything stands on, and what of it each may use. "" is `import lightspan` itself.
GROUND: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    **{floor: {"errors"} for floor in ("cards", "distributed", "files", "layers", "patterns", "ranges", "ties")},
    "absent": {"errors"},
    "memory": {"sharded"},
    "sharded": {"devices", "errors"},
    **{floor: set() for floor in ("blocks", "devices", "drawing", "noise", "places", "run_files", "unit_length")},
    "caches": {"errors", "files"},
    "console": {"errors"},
    "foreign": {"errors", "files"},
    "array_files": {"foreign"},
    "captures": {"errors", "files", "foreign", "run_files", "tensor_files"},
    "results": {"drawing", "errors"},
    "tensor_files": {"errors", "files", "foreign", "run_files"},
}
# Floor -> the other floors it may use. LIBRARIES, of which the command line is made, may use all but that; SHELL all.
MAY_USE: dict[str, set[str]] = {
    "triton_kernels": set(),
    "subspaces": {"triton_kernels"},
    "optim": {"subspaces", "triton_kernels"},
    "adapters": {"subspaces"},
    "surgery": {"adapters", "subspaces"},
    "objectives": set(),
    "nn": {"subspaces"},
    "backbones": {"nn"},
    "targets": {"nn", "objectives", "optim"},
    "analysis": {"nn", "subspaces"},
    "features": {"analysis", "checkpoints", "nn"},
    "estimators": {"analysis", "features", "merging", "subspaces"},
    "merging": {"adapters", "checkpoints", "method", "objectives", "subspaces"},
    "strategies": {"optim"},
    "signals": set(),
    "loggers": set(),
    "checkpoints": {"loggers", "strategies"},
    "wiring": {"optim"},
    "deepspeed": {"optim", "callbacks", "checkpoints", "strategies", "wiring"},
    "method": {"nn", "optim", "strategies", "wiring"},
    "methods": {
        *("method", "subspaces", "optim", "adapters", "surgery", "objectives", "merging"),
        *("nn", "backbones", "targets", "analysis", "triton_kernels"),
    },
    "callbacks": {
        *("subspaces", "optim", "adapters", "nn", "analysis", "features", "estimators", "strategies", "wiring"),
        *("checkpoints", "loggers", "signals"),
    },
    "datamodules": set(),
    "recipes": set(),
}
# The typed batches are the contract between data and everything that reads it: types alone, no behaviour.
SHARED_TYPES = "lightspan.datamodules.batches"
LIBRARIES = {"config", "exports", "intrinsic", "launch", "planning", "replay", "report", "runs", "scaling", "sweeps"}
SHELL = {"__init__", "__main__", "cli", "commands"}
# `lightspan` offers these at its root; each stands for the module it comes from.
AT_ROOT = {"Method": "method", "UserError": "errors", "__version__": ""}
# Pure tensor code, usable without a trainer.
WITHOUT_LIGHTNING = (
    *("triton_kernels", "subspaces", "optim", "adapters", "surgery", "objectives", "nn", "backbones", "targets"),
)


def floor_of(name: str) -> str:
    """`lightspan.optim.groups.f` -> `optim`; the package itself and its own names -> what they stand for."""
    rest = name.removeprefix("lightspan").removeprefix(".").split(".")[0]
    return AT_ROOT.get(rest, rest)


SOURCES = sources()


def test_the_rules_see_the_whole_house() -> None:
    floors = {name.split(".")[0] for name, _ in SOURCES}
    assert len(SOURCES) > 40
    assert {"optim", "methods", "callbacks", "datamodules"} <= floors
    known = GROUND.keys() | MAY_USE.keys() | LIBRARIES | SHELL
    assert floors <= known, f"a new floor needs its place in the table: {floors - known}"


def may_use(floor: str) -> set[str]:
    """The floors that a floor other than SHELL may import."""
    if floor in GROUND:
        return GROUND[floor]
    return GROUND.keys() | (MAY_USE.keys() | LIBRARIES if floor in LIBRARIES else MAY_USE[floor])


def test_imports_run_down_the_house_only() -> None:
    wrong = []
    for module, file in SOURCES:
        floor = module.split(".")[0]
        if floor not in SHELL:
            allowed = {floor} | may_use(floor)
            wrong += [
                f"{place} imports {name}; {floor} may use {sorted(allowed - {''})}"
                for place, name in imports(file)
                if name.split(".")[0] == "lightspan"
                and floor_of(name) not in allowed
                and not name.startswith(SHARED_TYPES)
            ]
    assert not wrong, "\n".join(wrong)


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
    wrong = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in rule(file.read_text())]
    assert not wrong, "\n".join(wrong)
