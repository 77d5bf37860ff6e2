"""How far a call leads through the files of this project: someone who follows it has to read these."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


@contextmanager
def files_passed(folder: Path) -> Iterator[set[str]]:
    """The files below a folder of which functions are called inside, such as `matrices/stacks`."""
    passed, before = set[str](), sys.getprofile()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and folder in path.parents:
            passed.add(path.relative_to(folder).with_suffix("").as_posix())

    sys.setprofile(watch)
    try:
        yield passed
    finally:
        sys.setprofile(before)
