"""How far a call leads through the files of this project: someone who follows it has to read these."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightspan.core import errors

ROOT = Path(errors.__file__).parents[2]


@contextmanager
def files_passed() -> Iterator[set[str]]:
    """The files of the project of which functions are called inside, such as `framework/optim/muon`."""
    passed, before = set[str](), sys.getprofile()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and ROOT in path.parents and "site-packages" not in path.parts:
            passed.add(path.relative_to(ROOT).with_suffix("").as_posix())

    sys.setprofile(watch)
    try:
        yield passed
    finally:
        sys.setprofile(before)
        passed -= {file for file in passed if file.startswith("tests/")}
