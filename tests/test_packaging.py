"""What a user's site-packages receives: one import name, the data that belongs to it, and no work at import."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from source_copies import SOURCES, copy_sources
from waiting import HANG_S

import lightspan

ROOT = Path(__file__).parents[1]
IMAGES = "lightspan/datamodules/assets/fashion_mnist_4k.npz"
INFO = f"lightspan-{lightspan.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_sources(tmp_path_factory.mktemp("sources"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, copy]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def members(wheel: Path) -> dict[str, int]:
    """File name -> size in bytes of everything in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=HANG_S
    )


def test_nothing_but_lightspan_reaches_site_packages(members: dict[str, int]) -> None:
    assert {name.split("/")[0] for name in members} == {"lightspan", INFO}


def test_every_source_file_is_in_the_wheel(members: dict[str, int]) -> None:
    folders = {"framework": "lightspan", **{folder: f"lightspan/{folder}" for folder in SOURCES[1:]}}
    expected = {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in folders.items()
        for pattern in ("*.py", "*.yaml", "assets/*", "assets/*/*")
        for file in (ROOT / folder).rglob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "lightspan/recipes/language/quickstart.yaml" in expected
    assert expected <= members.keys()


def test_the_wheel_says_that_it_is_typed(members: dict[str, int]) -> None:
    assert "lightspan/py.typed" in members


def test_the_shipped_images_are_small_and_carry_their_licence(members: dict[str, int]) -> None:
    assert 0 < members[IMAGES] < 1_800_000
    folder = IMAGES.rpartition("/")[0]
    licences = [name for name in members if name.startswith(folder) and "LICENSE" in name.upper()]
    assert licences, "the Fashion-MNIST images need their MIT notice beside them"


def test_the_licence_and_the_notice_travel_with_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read(f"{INFO}/licenses/LICENSE").decode()
        notice = archive.read(f"{INFO}/licenses/NOTICE").decode()
    assert "Apache License" in licence
    assert "APPENDIX: How to apply the Apache License" in licence
    assert "Fashion-MNIST" in notice


def test_a_wheel_without_a_checkout_lists_its_recipes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import sys; sys.argv = ['lightspan', 'recipes']; from lightspan.cli import main as cli; "
    code += "print(cli.__file__); cli.main()"
    done = run_python(code, tmp_path, PYTHONPATH=str(site))
    assert str(site) in done.stdout.splitlines()[0], done.stderr
    assert "language/quickstart" in done.stdout


def test_the_versions_of_package_and_project_agree(members: dict[str, int]) -> None:
    assert f"{INFO}/METADATA" in members


def test_importing_lightspan_changes_nothing_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = """
import json, os, sys, threading
before = dict(os.environ), list(sys.path), sys.excepthook, threading.active_count()
import lightspan
assert before == (dict(os.environ), list(sys.path), sys.excepthook, threading.active_count())
print(json.dumps(sorted({"torch", "lightning", "numpy", "transformers", "yaml", "rich"} & sys.modules.keys())))
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("module", ["core.errors", "cli.main", "core.files", "cli.config"])
def test_what_the_quick_verbs_need_never_loads_torch(module: str, tmp_path: Path) -> None:
    folder = ROOT / "framework" / module.replace(".", "/")
    files = [file for file in folder.glob("[!_]*.py") if file.stem not in ("arrays", "tensors")]  # these read arrays
    parts = [f"lightspan.{module}", *(f"lightspan.{module}.{file.stem}" for file in files)]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {parts!r}]; print(*sys.modules)"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "lightning", "numpy"} & set(done.stdout.split())


def modules() -> list[str]:
    """Every module of the package by its import name, from the folders that setup.py maps; `__main__` runs instead."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (mapping,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FOLDERS")
    return sorted(
        ".".join((package, *file.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
        for package, folder in ast.literal_eval(mapping).items()
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "__main__.py"
    )


def test_there_are_modules_to_import() -> None:
    assert {"lightspan", "lightspan.cli.main", "lightspan.datamodules.text.windows", "lightspan.triton_kernels"} <= set(
        modules()
    )


@pytest.mark.runs
def test_every_module_imports_in_silence(tmp_path: Path) -> None:
    """One process, so that the heavy imports are paid once; what each module prints would be seen."""
    code = f"""
import importlib, json, os, sys, traceback
failures = {{}}
for name in {modules()!r}:
    try:
        importlib.import_module(name)
    except Exception:
        failures[name] = traceback.format_exc(limit=-2)
print(json.dumps(failures))
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    *noise, last = done.stdout.splitlines()
    failures = json.loads(last)
    assert not noise
    assert not failures, "\n".join(failures.values())


def test_no_script_on_the_path_of_the_tests_hides_a_package() -> None:
    """`kernels.py` did, once transformers came to import a package of that name."""
    ours = {file.stem for folder in ("tests", "benchmarks", "evidence") for file in (ROOT / folder).glob("*.py")}
    assert "gpu_kernels" in ours
    assert not ours & (packages_distributions().keys() | sys.stdlib_module_names)
