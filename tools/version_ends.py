"""Prints what pip needs to install the ends of the ranges in pyproject.toml, and beyond.

`make test-lowest` runs `tools/version_ends.py lowest pyproject.toml EXTRA...`, for constraints that hold every
dependency at its lowest version; `make test-newest` runs it with `newest`, for requirements without their upper ends.
"""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def lowest(requirements: Iterable[str]) -> Iterator[str]:
    """`NAME==VERSION` for each requirement, with its marker if it has one.

    Raises: ValueError for a requirement without a lower bound: nobody can say what it promises.
    """
    for requirement in map(Requirement, requirements):
        bounds = [part.version for part in requirement.specifier if part.operator in (">=", "==", "~=")]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} has {len(bounds)} lower bounds; write one, as in {requirement.name}>=1.0")
        yield f"{requirement.name}=={bounds[0]}" + (f"; {requirement.marker}" if requirement.marker else "")


def newest(requirements: Iterable[str]) -> Iterator[str]:
    """Each requirement as it is, but for bounds from above."""
    for requirement in map(Requirement, requirements):
        lower = [str(part) for part in requirement.specifier if part.operator == ">="]
        requirement.specifier = SpecifierSet(",".join(lower))
        yield str(requirement)


ENDS = {"lowest": lowest, "newest": newest}


def requirements_of(project: dict, extras: Iterable[str]) -> Iterator[str]:
    """The base dependencies and those of `extras`; an extra that names others of the project is followed."""
    yield from project["dependencies"]
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                yield from requirements_of({**project, "dependencies": []}, sorted(requirement.extras))
            else:
                yield line


def main(end: str, pyproject: str, *extras: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    print(*dict.fromkeys(ENDS[end](requirements_of(project, extras))), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
