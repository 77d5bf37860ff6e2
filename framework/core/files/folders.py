"""The files below a folder, in an order that does not depend on the machine."""

import os
from collections.abc import Iterator
from pathlib import Path

# Tests are left out of the standard library because they repeat one another; the rest is not the library's own.
LIBRARY_LEAVES_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def find_files(root: Path, suffixes: tuple[str, ...], leave_out: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """(path relative to root, path) of the files under `root` whose names end in one of the suffixes, in sorted order.

    Folders named in `leave_out` are not entered. Links are not followed, so nothing is read twice or from elsewhere.
    """
    for folder, children, names in os.walk(root, followlinks=False):
        children[:] = sorted(child for child in children if child not in leave_out)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(suffixes) and path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path
