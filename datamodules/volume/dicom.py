"""DICOM files by SimpleITK, in a process of its own: its decoders are C++, and where a file makes one of them fail,
that process ends and no other. Without torch.

Run as a program it answers one request a line, {"path": ..., "voxels": whether}, by a line of JSON, after which the
bytes of the voxels follow.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.foreign import bounded_memory
from lightspan.core.resident import rss_bytes

_KEPT = 2**28  # bytes that the decoder may keep of damaged files, before another process goes on in its place
_TAGS = {"series": "0020|000e", "bits": "0028|0100"}
_running: dict[int, subprocess.Popen[bytes]] = {}  # by the process that asks; a fork does not share its parent's


def header(path: Path) -> dict[str, Any]:
    """`size`, `spacing`, `origin` and `direction` as SimpleITK has them, `components` of a voxel, `bits` and `series`.

    Raises: ValueError for what is no DICOM image, or damaged; UserError without SimpleITK.
    """
    return _asked(path, voxels=False)[0]


def voxels(path: Path) -> np.ndarray:
    """[..., y, x] in the file's unit. Raises: ValueError for what cannot be decoded."""
    answer, content = _asked(path, voxels=True)
    return np.frombuffer(content, answer["dtype"]).reshape(answer["shape"])


def without(package: str) -> UserError:
    """What to raise where a package is missing that reads volumes."""
    return UserError(f"volumes are read by {package}, which is not installed: {install_extra('volumes')}")


def _asked(path: Path, voxels: bool) -> tuple[dict[str, Any], bytes]:
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"path": str(path.absolute()), "voxels": voxels}).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        content = process.stdout.read(answer.get("bytes", 0))
        if len(content) < answer.get("bytes", 0):
            raise EOFError
    except (OSError, EOFError, ValueError) as error:  # no line is no JSON
        status = _ended(process)
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise ValueError(f"it makes its decoder fail ({name}), and so is damaged") from error
    except BaseException:  # half an answer would be taken for the next one's
        _ended(process)
        raise
    if answer["last"]:
        _ended(process)
    if "missing" in answer:
        raise without("SimpleITK")
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer, content


def _process() -> subprocess.Popen[bytes]:
    if os.getpid() not in _running:
        if not _running:
            atexit.register(_end)
        # -P: no module of the current folder is imported.
        command = [sys.executable, "-P", "-m", __name__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _running[os.getpid()] = subprocess.Popen(command, **pipes)
    return _running[os.getpid()]


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Ends this process's reader, whose exit status it gives."""
    _running.pop(os.getpid(), None)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)  # of one that is ending by itself
    process.kill()
    with process:
        return process.wait()


def _end() -> None:
    if (process := _running.get(os.getpid())) is not None:
        process.kill()
        _ended(process)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    try:
        import SimpleITK
    except ImportError:
        answers.write(b'{"missing": true, "last": true}\n')
        return
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what is wrong is said once, by us
    first = rss_bytes()
    for line in requests:
        asked, content = json.loads(line), b""
        try:
            with bounded_memory():
                answer, content = _read(SimpleITK, asked["path"], asked["voxels"])
        except (RuntimeError, ValueError, MemoryError) as error:
            last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            answer = {"error": re.sub(r"\(0x[0-9a-f]+\)", "", last_line)}  # addresses differ from run to run
        last = rss_bytes() - first > _KEPT
        answers.write(json.dumps(answer | {"bytes": len(content), "last": last}).encode() + b"\n" + content)
        answers.flush()
        if last:
            return


def _read(sitk: Any, path: str, voxels: bool) -> tuple[dict[str, Any], bytes]:
    if voxels:
        array = sitk.GetArrayFromImage(sitk.ReadImage(path, imageIO="GDCMImageIO"))
        return {"dtype": array.dtype.str, "shape": array.shape}, array.tobytes()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    told = {name: reader.GetMetaData(tag) for name, tag in _TAGS.items() if reader.HasMetaDataKey(tag)}
    geometry = {name: getattr(reader, f"Get{name.title()}")() for name in ("size", "spacing", "origin", "direction")}
    return {**told, **geometry, "components": reader.GetNumberOfComponents()}, b""


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
