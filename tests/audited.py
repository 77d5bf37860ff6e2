"""What a block of code does to the machine, as Python reports it to its auditors."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile", "tempfile.mkdtemp", "tempfile.mkstemp"),
)
ACTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo"),
    *("pickle.find_class", "ctypes.dlopen", "code.__new__", "webbrowser.open"),
)
_heard: list[tuple[str, tuple[Any, ...]]] | None = None  # None: nobody listens


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & 3)
        if writes and not str(path).endswith((".pyc", "/dev/null")) and ".pyc." not in str(path):
            _heard.append((event, arguments))
    # torch looks for GPUs
    elif event in (*CHANGES, *ACTS) and not (event == "ctypes.dlopen" and "libnvidia-ml" in str(arguments)):
        _heard.append((event, arguments))


def _auditor(added: list[bool] = []) -> None:  # noqa: B006 - a hook can be added once and never removed
    if not added:
        sys.addaudithook(_listen)
        added.append(True)


@contextlib.contextmanager
def heard() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The events of the block with their arguments."""
    global _heard
    _auditor()
    _heard = events = []
    try:
        yield events
    finally:
        _heard = None


@contextlib.contextmanager
def nothing_happens() -> Iterator[None]:
    """Fails if the block starts a process, changes a file, reads a pickle, or calls another machine."""
    with heard() as events:
        yield
    assert [f"{event} {arguments}"[:300] for event, arguments in events] == []


@contextlib.contextmanager
def writes_only_below(folder: Path) -> Iterator[None]:
    """Fails if the block makes, changes or removes a file that is not in a folder."""
    with heard() as events:
        yield
    outside = []
    for event, arguments in events:
        if event in ("open", *CHANGES):
            for place in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else 1]:
                descriptor = isinstance(place, int) or len(str(place)) == 0  # of a file that was opened before
                below = event in ("shutil.rmtree", "os.rmdir", "os.remove") and not Path(str(place)).is_absolute()
                if not descriptor and not below and folder not in Path(str(place)).absolute().parents:
                    outside.append(f"{event} {arguments}"[:300])
    assert outside == []
