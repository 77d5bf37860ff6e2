"""Builds the wheel and the sdist, checks them, and tries the wheel in a new environment of each interpreter.

`make release-check` runs: tools/release_check.py OUT PYTHON...
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What has to work right after an installation; the verbs before `fit` need no dependency beyond PyYAML and packaging.
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


def build(sources: Path, out: Path) -> tuple[Path, Path]:
    """(wheel, sdist) in the folder `out`; the wheel is built from the sdist, so that the sdist is whole."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)]
    _run(command, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def check(files: Iterable[Path]) -> None:
    """Raises: CalledProcessError for metadata that a package index would refuse or show badly."""
    _run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)])


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
    tried = []
    for name in pythons:
        if (python := shutil.which(name)) is None:
            print(f"{name}: not on the PATH, not tried")
            continue
        print(f"{name}: installing with all dependencies", flush=True)
        venv = environment(python, folder / "venv")
        install(venv, files[0])
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
