"""Prints the test files that a change may break, nearest first, for `make quick`.

Changed is what differs from the commit where this branch left main, and what is not committed yet. A test file is as
far from a change as it takes imports to get there, through the package and the helpers of the tests. A file that is no
module, such as a recipe or a page, is one import away from the test files that mention it.
"""

import subprocess
import sys
from collections import deque
from pathlib import Path

from import_graph import PACKAGES, ROOT, imports

ALWAYS = ("tests/test_golden.py", "tests/test_recipes_train.py", "tests/test_house_rules.py")
"""One golden run, one recipe of each family, and the rules, whatever changed."""
MOST = 100
"""Files, which take a minute: loading all of them would leave no time to run one."""


def changed() -> set[str]:
    """Paths below the root."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    known = git("branch", "--list", "--format=%(refname:short)", "main").split()
    base = git("merge-base", "main", "HEAD").strip() if known else "HEAD"
    names = git("diff", "--name-only", base) + git("ls-files", "--others", "--exclude-standard")
    return set(names.splitlines())


def modules() -> dict[str, Path]:
    """Name that an import uses -> file, of the package and of the tests."""
    found = {}
    for folder, prefix in {**PACKAGES, "tests": ""}.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([*filter(None, [prefix]), *parts])] = file
    return found


def affected(names: set[str]) -> list[Path]:
    """Test files that the changed paths `names` may break, nearest first."""
    known = modules()
    importers: dict[Path, set[Path]] = {}
    for file in known.values():
        for _, name in imports(file):
            imported = known.get(name) or known.get(name.rpartition(".")[0])
            if imported is not None:
                importers.setdefault(imported, set()).add(file)
    # A fixture of a conftest.py is not imported: its folder stands on it.
    for file in known.values():
        if file.name == "conftest.py":
            importers.setdefault(file, set()).update(file.parent.rglob("test_*.py"))
    distance = {ROOT / name: 0 for name in names}
    others = {name.removesuffix(".yaml").removeprefix("recipes/") for name in names if not name.endswith(".py")}
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    if others:
        texts = {file: file.read_text() for file in tests}
        distance |= {file: 1 for file in tests if any(name in texts[file] for name in others)} | distance
    queue = deque(sorted(distance, key=distance.__getitem__))
    while queue:
        file = queue.popleft()
        for importer in sorted(importers.get(file, ())):
            if importer not in distance:
                distance[importer] = distance[file] + 1
                queue.append(importer)
    return sorted((file for file in tests if file in distance), key=lambda file: (distance[file], file))


if __name__ == "__main__":
    found = list(dict.fromkeys([*(ROOT / name for name in ALWAYS), *affected(changed())]))
    print(*(file.relative_to(ROOT) for file in found[:MOST]))
    if len(found) > MOST:
        print(f"{len(found) - MOST} test files farther from the changes are left to `make test`", file=sys.stderr)
