"""A copy of what the distributions are built from, so that no leftover in build/ can find its way in."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("framework", "callbacks", "datamodules", "recipes", "triton_kernels")
BESIDE = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"),
)


def copy_sources(target: Path) -> Path:
    """Copies them into the folder `target`, and returns it."""
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, target)
    return target
