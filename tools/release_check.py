"""Builds the wheel and the sdist, checks them, and tries the wheel in a new environment of each interpreter.

`make release-check` runs: tools/release_check.py OUT PYTHON...
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of the wheel: 1.7 MB are the images of Fashion-MNIST, with which recipes run right after an installation, 0.9 MB the
# weights that `lightspan pull` finds in it (`SHIPPED_BYTES` of evidence/zoo_weights.py limits them), and 3.0 MB sources
# and recipes. More weights or a second data set would show here.
MOST_MB = 6.0
# What has to work right after an installation. None of these loads torch; `check` reads sources of Lightning and torch,
# the others need PyYAML, packaging and filelock alone.
QUICK = (
    ("--version",),
    ("recipes",),
    ("show", "language/quickstart"),
    ("check", "language/quickstart"),
    ("completion", "bash"),
)
WHOLE = (
    ("doctor",),
    (
        *("fit", "language/quickstart", "--run", "run", "trainer.max_steps=2"),
        *("trainer.val_check_interval=2", "trainer.limit_val_batches=1"),
    ),
    ("report", "run"),
    ("export", "run", "--to", "safetensors"),
)
# Prints seconds of `import lightspan`, those of `import json`, and what it loads besides Python's own modules.
IMPORTING = """
import sys, time
begun = time.perf_counter()
import json
between = time.perf_counter()
before = set(sys.modules)
import lightspan
ended = time.perf_counter()
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([ended - between, between - begun, sorted(loaded - sys.stdlib_module_names - {"lightspan"})]))
"""


def build(sources: Path, out: Path) -> tuple[Path, Path]:
    """(wheel, sdist) in the folder `out`; the wheel is built from the sdist, so that the sdist is whole."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)]
    _run(command, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def check(files: Iterable[Path]) -> None:
    """Raises: CalledProcessError for metadata that a package index would refuse or show badly."""
    _run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)])


def size_mb(wheel: Path) -> float:
    """The wheel's size in MB (10^6 bytes). Raises: SystemExit if it is larger than MOST_MB."""
    if (size := wheel.stat().st_size / 1e6) > MOST_MB:
        raise SystemExit(
            f"{wheel.name} has {size:.2f} MB, more than {MOST_MB}: leave out what an installation does not need"
        )
    return size


def importing(python: Path, variables: Mapping[str, str] = {}) -> tuple[float, float]:
    """Seconds that `import lightspan` takes in a new process, and `import json` there: each the median of five.

    Raises: SystemExit if it loads more than itself and Python's own modules.
    """
    command = [str(python), "-c", IMPORTING]
    runs = [_run(command, env=os.environ | variables, capture_output=True, text=True).stdout for _ in range(5)]
    own, reference, foreign = zip(*map(json.loads, runs), strict=True)
    if foreign[0]:
        raise SystemExit(f"import lightspan loads {', '.join(foreign[0])}: import them where they are used")
    return statistics.median(own), statistics.median(reference)


def environment(python: str, folder: Path) -> Path:
    """A new environment of this interpreter without any package; returns its interpreter."""
    _run([python, "-m", "venv", "--clear", "--without-pip", str(folder)])
    return folder / "bin" / "python"


def install(python: Path, wheel: Path, *options: str) -> None:
    """Installs the wheel into the environment of this interpreter, with its dependencies unless `options` say no."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", *options, str(wheel)])


def smoke(python: Path, commands: Iterable[Sequence[str]], folder: Path, variables: Mapping[str, str] = {}) -> None:
    """Runs command lines of the installed `lightspan` in a folder. Raises: CalledProcessError if one fails."""
    for words in commands:
        print("lightspan", *words, flush=True)
        command = [str(python.with_name("lightspan")), *words]
        _run(command, cwd=folder, env=os.environ | variables, stdout=subprocess.DEVNULL)


def main(out: str, *pythons: str) -> int:
    """0 if all interpreters that are there have passed, 1 if there is none."""
    folder = Path(out).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = build(ROOT, folder / "dist")
    check(files)
    print(f"{files[0].name}: {size_mb(files[0]):.2f} MB, at most {MOST_MB}")
    tried = []
    for name in pythons:
        if (python := shutil.which(name)) is None:
            print(f"{name}: not on the PATH, not tried")
            continue
        print(f"{name}: installing with all dependencies", flush=True)
        venv = environment(python, folder / "venv")
        install(venv, files[0])
        own, reference = importing(venv)
        print(f"import lightspan: {own:.4f} s, {own / reference:.1f} times import json")
        (work := folder / Path(name).name).mkdir()
        smoke(venv, QUICK + WHOLE, work)
        tried.append(_run([str(venv), "-VV"], capture_output=True, text=True).stdout.strip())
        shutil.rmtree(folder / "venv")  # 1 to 6 GB each
    print("passed:", *tried or ["none"], sep="\n  ")
    return 0 if tried else 1


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, **options)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
