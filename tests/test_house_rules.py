"""Who may import whom: the arrows run down the table of floors only, so a part is usable without what stands on it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "callbacks": "lightspan.callbacks",
    "datamodules": "lightspan.datamodules",
    "recipes": "lightspan.recipes",
    "triton_kernels": "lightspan.triton_kernels",
    "framework": "lightspan",
}

GROUND = {"", "devices", "errors", "facts", "files", "distributed", "patterns"}  # "" is `import lightspan` itself
# Floor -> the other floors it may use. The command line and what it is made of (TOP) may use all.
MAY_USE: dict[str, set[str]] = {
    "devices": set(),
    "errors": set(),
    "facts": set(),
    "files": set(),
    "distributed": set(),
    "patterns": set(),
    "triton_kernels": set(),
    "subspaces": {"triton_kernels"},
    "optim": {"subspaces", "triton_kernels"},
    "adapters": {"subspaces"},
    "objectives": set(),
    "nn": set(),
    "backbones": {"nn"},
    "analysis": {"subspaces"},
    "strategies": {"optim"},
    "signals": set(),
    "loggers": set(),
    "checkpoints": {"loggers", "strategies"},
    "deepspeed": {"optim", "callbacks", "checkpoints", "strategies"},
    "method": {"nn", "optim", "strategies"},
    "methods": {
        *("method", "subspaces", "optim", "adapters", "objectives"),
        *("nn", "backbones", "analysis", "triton_kernels"),
    },
    "callbacks": {"subspaces", "optim", "adapters", "analysis", "checkpoints", "loggers", "signals", "strategies"},
    "datamodules": set(),
    "recipes": set(),
}
# The typed batches are the contract between data and everything that reads it: types alone, no behaviour.
SHARED_TYPES = "lightspan.datamodules.batches"
TOP = {
    *("__init__", "__main__", "cli", "commands", "config", "exports"),
    *("intrinsic", "launch", "planning", "report", "runs"),
}
# `lightspan` offers these at its root; each stands for the module it comes from.
AT_ROOT = {"Method": "method", "UserError": "errors", "__version__": ""}
# Pure tensor code, usable without a trainer.
WITHOUT_LIGHTNING = ("triton_kernels", "subspaces", "adapters", "objectives", "nn", "backbones")


def sources() -> list[tuple[str, Path]]:
    """(dotted module name below lightspan, file) of every source file."""
    return [
        (".".join((package, *file.relative_to(ROOT / folder).with_suffix("").parts)).removeprefix("lightspan."), file)
        for folder, package in PACKAGES.items()
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file, inside functions too; relative ones come as `.name`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def floor_of(name: str) -> str:
    """`lightspan.optim.groups.f` -> `optim`; the package itself and its own names -> what they stand for."""
    rest = name.removeprefix("lightspan").removeprefix(".").split(".")[0]
    return AT_ROOT.get(rest, rest)


SOURCES = sources()


def test_the_rules_see_the_whole_house() -> None:
    floors = {name.split(".")[0] for name, _ in SOURCES}
    assert len(SOURCES) > 40
    assert {"optim", "methods", "callbacks", "datamodules"} <= floors
    assert floors <= MAY_USE.keys() | TOP, f"a new floor needs its place in the table: {floors - MAY_USE.keys() - TOP}"


BELOW_TOP = [pair for pair in SOURCES if pair[0].split(".")[0] not in TOP]


@pytest.mark.parametrize(("module", "file"), BELOW_TOP, ids=[name for name, _ in BELOW_TOP])
def test_imports_run_down_the_house_only(module: str, file: Path) -> None:
    floor = module.split(".")[0]
    allowed = MAY_USE[floor] | GROUND | {floor}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}; {floor} may use {sorted(allowed - {''})}"
        for line, name in imports(file)
        if name.split(".")[0] == "lightspan" and floor_of(name) not in allowed and not name.startswith(SHARED_TYPES)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("module", "file"), SOURCES, ids=[name for name, _ in SOURCES])
def test_imports_are_absolute(module: str, file: Path) -> None:
    assert not [f"{file.relative_to(ROOT)}:{line}" for line, name in imports(file) if name.startswith(".")]


METHODS = [pair for pair in SOURCES if pair[0].startswith("methods.")]


@pytest.mark.parametrize(("module", "file"), METHODS, ids=[name for name, _ in METHODS])
def test_no_method_imports_another_method(module: str, file: Path) -> None:
    assert not [name for _, name in imports(file) if name.startswith("lightspan.methods")]


PURE = [pair for pair in SOURCES if pair[0].startswith(WITHOUT_LIGHTNING)]


@pytest.mark.parametrize(("module", "file"), PURE, ids=[name for name, _ in PURE])
def test_tensor_code_never_imports_lightning(module: str, file: Path) -> None:
    roots = {name.split(".")[0] for _, name in imports(file)}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}
