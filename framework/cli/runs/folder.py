"""The run folder: where it is, who uses it, what it records about the run, and whether a run may continue in it."""

import contextlib
import errno
import itertools
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from lightspan.cli.config import identity, provenance
from lightspan.cli.config.resolve import Resolved, recorded
from lightspan.cli.config.tree import dump
from lightspan.core.errors import UserError, one_line, printable
from lightspan.core.files.atomic import (
    explained_os_errors,
    irregular,
    put_back,
    refuse_link_out,
    remove_leftovers,
    write_atomic,
)
from lightspan.core.files.foreign import SETTINGS_BYTES, settings_object
from lightspan.core.files.runs import CHECKPOINTS, FAILED, LOCK, MERGED, METRICS, MODEL, PROVENANCE, RESOLVED
from lightspan.core.files.stores import in_store
from lightspan.training.checkpoints.copies import fetched
from lightspan.training.checkpoints.manifest import LAST, checkpoints, manifest, newest_whole, not_a_checkpoint

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LAST_CHECKPOINT = Path(CHECKPOINTS) / LAST
LOCK_WAIT_S = 30.0
TASK_VARIABLE = "LIGHTSPAN_TASK"
"""Names the run folder of a task of an array, in the environment of its process."""
_RUN_VARIABLE = "LIGHTSPAN_RUN"  # how the ranks that Lightning starts find the folder of rank 0


def run_folder(given: Path | None, name: str, make: bool = True) -> Path:
    """The absolute run folder: as given, or a new one named by recipe and time, which no other run shares.

    Args:
        make: also make it, on the first rank.
    Raises: UserError if it cannot be made, contains a link that leads out of it, a pipe or a device, or if ranks
        started by another program would each choose their own.
    """
    if given is not None:
        folder = given.absolute()
        if make and is_first_rank():
            _make(folder, exist_ok=True)
            _refuse_what_leads_out(folder)
        return folder
    if _RUN_VARIABLE in os.environ and not is_first_rank():
        return Path(os.environ[_RUN_VARIABLE])
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        raise UserError("several ranks were started by another program; give --run DIR so that they share one folder")
    first = Path("runs").absolute() / name.replace("/", "-") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        with contextlib.suppress(FileExistsError):  # from a run that began in the same second
            if make:
                _make(folder, exist_ok=False)
            elif folder.exists():
                continue
            break
    os.environ[_RUN_VARIABLE] = str(folder)
    return folder


def _refuse_what_leads_out(folder: Path) -> None:
    """Raises: UserError for a link out of the folder, through which a run would write, and for a pipe or a device, on
    which it would wait.
    """
    for inside, folders, files in os.walk(folder):
        for name in (*folders, *files):
            refuse_link_out(Path(inside, name), folder, "its run folder")
        for path in (Path(inside, name) for name in files):
            if (reason := irregular(path)) and os.path.lexists(path):  # one that is not there by now was temporary
                raise UserError(f"{path} {reason}; remove it, or give another --run DIR")


def _make(folder: Path, exist_ok: bool) -> None:
    try:
        with explained_os_errors(folder) if exist_ok else contextlib.nullcontext():
            folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:  # a name that is too long, or a place where no folder can be made
        text = str(folder)
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        raise UserError(f"--run: {shown} cannot be made: {error.strerror}; give another folder") from error


@contextlib.contextmanager
def sole_use(run_dir: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Locks a run folder for the first rank of one run: a second run there would overwrite its files.

    Waits a while for a run that is ending. The lock ends with its process, however that ends, also on other machines
    if the file system supports locks; otherwise there is no lock. Leftovers of killed writes are removed.
    Raises: UserError while another run uses the folder.
    """
    if fcntl is None or not is_first_rank():
        yield
        return
    path = run_dir / LOCK
    with _opened(path) as file:
        until_s = time.monotonic() + wait_s
        while not _locked(file):
            if time.monotonic() > until_s:
                holder = path.read_text().strip() or "an unknown process"
                raise UserError(
                    f"{run_dir} is in use by {holder}; wait for that run, end it, or give another --run DIR"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        remove_leftovers(run_dir)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if [*run_dir.iterdir()] == [path]:  # refused before anything was written
                    path.unlink()
                    run_dir.rmdir()
            raise


def _opened(path: Path) -> TextIO:
    """Never what a link leads to: the lock's content is replaced, and the folder may be of somebody else."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    with explained_os_errors(path):
        if fault := "is a link" if path.is_symlink() else path.exists() and irregular(path):
            raise UserError(f"{path} {fault}, but the lock of a run is a file of its own; remove it")
        return open(os.open(path, flags, 0o666), "a+")


def _locked(file: TextIO) -> bool:
    """POSIX locks: forked data workers do not inherit them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # any other: this file system has no locks
    return True


def checkpoint_to_resume(how: str, run_dir: Path, given: bool) -> Path | None:
    """The checkpoint that --resume means, or None for a fresh start. Raises: UserError if it would lose a run.

    Args:
        how: auto, never, the path of a checkpoint, or the address of copies in an object store.
        given: whether the user named the run folder; a folder made for this run holds nothing to continue.

    `auto` chooses the newest whole one and names on stderr those that it skipped. The first rank chooses for all, so
    only it reads checkpoints to compare their sha256.
    """
    folder = run_dir / CHECKPOINTS
    holds_run = bool(checkpoints(folder)) or _has_content(run_dir / METRICS)
    if how == "auto":
        return newest_checkpoint(run_dir) if given else None
    if how == "never":
        if holds_run:
            raise UserError(
                f"--resume never: {run_dir} already contains a run; give another --run DIR or delete that folder"
            )
        return None
    path, stored = Path(how), in_store(how)
    if not stored and not path.exists():
        raise UserError(f"--resume {how}: no such file; give auto, never or the path of a checkpoint")
    if not stored and (other := not_a_checkpoint(path)):
        raise UserError(f"--resume {path} {other}")
    if checkpoints(folder) and (stored or run_dir not in path.absolute().parents):
        raise UserError(
            f"--resume {how}: {run_dir} contains another run, which would be overwritten; give another --run DIR"
        )
    return fetched(how) if stored else path.absolute()


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if the run never had one; torn ones are named on stderr.

    Raises: UserError if there are checkpoints but none of them is whole, and for a link out of the run folder.
    """
    folder = run_dir / CHECKPOINTS
    refuse_link_out(folder, run_dir, "its run folder")  # files in it may be renamed
    put_back(folder)
    found, passed = newest_whole(folder, contents=is_first_rank())
    reasons = [f"{path} {fault.text}" for path, fault in passed.items()]
    if found is None and passed:
        raise UserError(
            f"no checkpoint of {run_dir} is whole: {'; '.join(reasons)}. `lightspan fsck {run_dir}` moves them out of "
            "the way, and the run then starts from the beginning"
        )
    if reasons and is_first_rank():
        print(printable(f"lightspan: {'; '.join(reasons)}; continuing from {found}"), file=sys.stderr)
    return found


def weights_alone(folder: Path) -> Path | None:
    """The weights that a merge or an export left in this folder; None where it is no such folder."""
    return next((path for name in (MERGED, MODEL) if (path := folder / name).is_file()), None)


def weights_to_evaluate(given: Path) -> Path:
    """What --ckpt means: a checkpoint, or weights alone as safetensors; of a run folder its newest whole checkpoint, of
    the folder of a merge or an export its weights.

    Raises: UserError where there is none of these.
    """
    if not given.exists():
        raise UserError(f"--ckpt {given}: no such file; a run keeps its checkpoints in RUN/checkpoints")
    if alone := weights_alone(given):
        return alone
    if not (given / RESOLVED).is_file():
        return given
    if (found := newest_checkpoint(given)) is None:
        raise UserError(f"--ckpt {given}: this run has no checkpoint; name another run, or a checkpoint")
    return found


def run_ids(checkpoint: Path) -> dict[str, str]:
    """{class path of a logger: the id of its run} according to a checkpoint's manifest; empty if it has none."""
    loggers = (manifest(checkpoint) or {}).get("loggers")
    return {str(name): str(run) for name, run in loggers.items()} if isinstance(loggers, dict) else {}


def refuse_other_experiment(resolved: Resolved, checkpoint: Path) -> None:
    """Raises UserError if a checkpoint was written by another experiment than this configuration."""
    source = checkpoint.parent.parent
    if not (source / RESOLVED).is_file():
        return
    found = identity.differences(recorded(source), resolved.config)
    if found:
        lines = "\n".join(f"  {line}" for line in found[:20]) + ("\n  ..." if len(found) > 20 else "")
        raise UserError(
            f"{checkpoint} belongs to another experiment; these settings differ (then -> now):\n{lines}\n"
            "Restore them, or start a new run with another --run DIR. A resumed run may change its length, devices, "
            "loggers, num_workers, and callbacks that declare alters_training = False."
        )


def set_metrics_aside(run_dir: Path) -> None:
    """Renames the metrics of a start that left no checkpoint, and says so: the run starts from the beginning."""
    path = run_dir / METRICS
    if not _has_content(path):
        return
    aside = next(p for n in itertools.count(1) if not (p := path.with_stem(f"{path.stem}-{n}")).exists())
    path.rename(aside)
    print(printable(f"note: the figures of an earlier start without a checkpoint are kept in {aside}"), file=sys.stderr)


def mark_failed(run_dir: Path, error: BaseException, step: int | None) -> None:
    """Says in the run folder that this start ended in an error, None: before its first step; `clear_mark` takes it
    back.
    """
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    where = "before its first step" if step is None else f"at step {step}"
    write_atomic(run_dir / FAILED, f"{when}, {where}: {type(error).__name__}: {one_line(error)}\n")


@contextlib.contextmanager
def recorded_start(run_dir: Path | None) -> Iterator[None]:
    """A task of an array has nobody who sees it fail, so that a start that fails inside is recorded in its run folder.

    Anybody else sees the message, and a mistake leaves no folder behind.
    """
    try:
        yield
    except Exception as error:
        if run_dir is not None and os.environ.get(TASK_VARIABLE) == str(run_dir) and is_first_rank():
            with contextlib.suppress(UserError, OSError):  # a full disk must not hide the first error
                mark_failed(run_dir, error, None)
        raise


def clear_mark(run_dir: Path) -> None:
    """Called when a run is started, perhaps again."""
    (run_dir / FAILED).unlink(missing_ok=True)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def write_run_files(
    resolved: Resolved,
    run_dir: Path,
    command_line: Sequence[str],
    overlays: Sequence[str],
    checkpoint: Path | None = None,
) -> None:
    """resolved.yaml and provenance.json; of earlier starts, under `earlier`, what was different then (null: absent)."""
    record = provenance.provenance(resolved, command_line, overlays)
    if checkpoint is not None:
        record["checkpoint"] = str(checkpoint)
    path = run_dir / PROVENANCE
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        before = settings_object(path)
        record["earlier"] = _earlier(record, [*before.pop("earlier", []), {}], before)
    write_atomic(run_dir / RESOLVED, dump(resolved.document()))
    write_atomic(path, json.dumps(record, indent=2) + "\n")


def _earlier(record: dict[str, Any], starts: Sequence[dict[str, Any]], before: dict[str, Any]) -> list[dict[str, Any]]:
    """How earlier starts differed from this one, the newest that fit into half of a settings file.

    Args:
        record: of this start.
        starts: how each differed from `before`, oldest first; `before` itself differs in nothing.
        before: the record of the previous start.
    """
    kept, room = deque[dict[str, Any]](), SETTINGS_BYTES.most // 2
    for differences in reversed(starts):
        start = before | differences
        entry = {key: start.get(key) for key in {**record, **start} if start.get(key) != record.get(key)}
        if (room := room - len(json.dumps(entry, indent=2))) < 0:
            break
        kept.appendleft(entry)
    return [*kept]


def is_first_rank() -> bool:
    """Whether this process is rank 0, according to the launchers' environment variables.

    Inside a SLURM allocation every process sees a SLURM_PROCID, also ranks that Lightning starts there: each has 0.
    """
    if rank := os.environ.get("RANK"):
        return rank == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
