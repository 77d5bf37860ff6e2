"""Maps the top-level folders into the one import package `lightspan`; everything else is in pyproject.toml.

The package list is computed here because a new method family is a new folder, and adding one must not need an edit.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "lightspan": "framework",
    "lightspan.callbacks": "callbacks",
    "lightspan.datamodules": "datamodules",
    "lightspan.recipes": "recipes",
    "lightspan.triton_kernels": "triton_kernels",
}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
]

setup(packages=packages, package_dir=FOLDERS)
