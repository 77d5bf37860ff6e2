"""The run folder: where it lies, what it records of the run, and whether a run may go on in it."""

import argparse
import json
import os
import sys
from datetime import datetime
from pathlib import Path

from lightspan.callbacks.checkpoint_manifest import checkpoints, manifest, newest_whole
from lightspan.config import identity, provenance
from lightspan.config.resolve import RESOLVED_FILE, Resolved, recorded
from lightspan.config.tree import dump
from lightspan.errors import UserError

PROVENANCE_FILE = "provenance.json"
CHECKPOINTS = "checkpoints"
LAST_CHECKPOINT = Path(CHECKPOINTS) / "last.ckpt"
_RUN_VARIABLE = "LIGHTSPAN_RUN"  # how the ranks that Lightning starts find the folder of rank 0


def run_folder(given: Path | None, name: str) -> Path:
    """The absolute run folder: as given, or a new one named by recipe and time. It is made by the first write.

    Raises: UserError where ranks started from outside would each choose a folder of their own.
    """
    if given is not None:
        return given.absolute()
    if _RUN_VARIABLE in os.environ and not is_first_rank():
        return Path(os.environ[_RUN_VARIABLE])
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        raise UserError("several ranks were started from outside; give --run DIR so that all of them share one folder")
    parent = Path("runs") / name.replace("/", "-")
    folder = parent / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(2, 1000):
        if not folder.exists():
            break
        folder = parent / f"{folder.name[:19]}-{number}"
    os.environ[_RUN_VARIABLE] = str(folder.absolute())
    return folder.absolute()


def checkpoint_to_resume(args: argparse.Namespace, run_dir: Path) -> Path | None:
    """The checkpoint that --resume means, or None for a fresh start. Raises: UserError where it would lose a run.

    `auto` takes the newest whole one and says on stderr what it passed over. Folders of a sharded run, which the first
    rank chooses for all, are read by that one alone to compare their sha256.
    """
    folder = run_dir / CHECKPOINTS
    holds_run = bool(checkpoints(folder))
    if args.resume == "auto":
        return newest_checkpoint(run_dir) if args.run is not None else None
    if args.resume == "never":
        if holds_run:
            raise UserError(
                f"--resume never: {run_dir} already holds a run; give another --run DIR or delete that folder"
            )
        return None
    path = Path(args.resume)
    if not path.exists():
        raise UserError(f"--resume {args.resume}: no such file; give auto, never or the path of a checkpoint")
    if holds_run and run_dir not in path.absolute().parents:
        raise UserError(
            f"--resume {path}: {run_dir} holds another run, which would be overwritten; give another --run DIR"
        )
    return path.absolute()


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where the run never had one; torn ones are named on stderr.

    Raises: UserError when there are checkpoints and not one of them is whole.
    """
    from lightspan.files import put_back

    folder = run_dir / CHECKPOINTS
    put_back(folder)
    found, passed = newest_whole(folder, read_folders=is_first_rank())
    reasons = [f"{path} {fault.text}" for path, fault in passed.items()]
    if found is None and passed:
        raise UserError(
            f"no checkpoint of {run_dir} is whole: {'; '.join(reasons)}. `lightspan fsck {run_dir}` moves them out of "
            "the way, and the run then starts anew"
        )
    if reasons and is_first_rank():
        print(f"lightspan: {'; '.join(reasons)}; going on from {found}", file=sys.stderr)
    return found


def run_ids(checkpoint: Path) -> dict[str, str]:
    """{class path of a logger: the id of its run} as a checkpoint's manifest tells; empty where it tells nothing."""
    loggers = (manifest(checkpoint) or {}).get("loggers")
    return {str(name): str(run) for name, run in loggers.items()} if isinstance(loggers, dict) else {}


def refuse_other_experiment(resolved: Resolved, checkpoint: Path) -> None:
    """Raises UserError where the run that wrote a checkpoint was another experiment than this configuration."""
    source = checkpoint.parent.parent
    if not (source / RESOLVED_FILE).is_file():
        return
    found = identity.differences(recorded(source), resolved.config)
    if found:
        lines = "\n".join(f"  {line}" for line in found[:20]) + ("\n  ..." if len(found) > 20 else "")
        raise UserError(
            f"{checkpoint} belongs to another experiment; these settings differ (then -> now):\n{lines}\n"
            "Put them back, or start a new run with another --run DIR. A resumed run may change its length, devices, "
            "loggers, num_workers, and callbacks that declare alters_training = False."
        )


def write_run_files(resolved: Resolved, run_dir: Path, args: argparse.Namespace, checkpoint: Path | None) -> None:
    """resolved.yaml and provenance.json; the provenance of earlier starts is kept under `earlier`."""
    from lightspan.files import write_atomic

    record = provenance.provenance(resolved, args.command_line, args.overlays)
    if checkpoint is not None:
        record["checkpoint"] = str(checkpoint)
    path = run_dir / PROVENANCE_FILE
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        record["earlier"] = [*earlier.pop("earlier", []), earlier]
    except (OSError, ValueError, AttributeError):
        pass
    write_atomic(run_dir / RESOLVED_FILE, dump(resolved.document()))
    write_atomic(path, json.dumps(record, indent=2) + "\n")


def is_first_rank() -> bool:
    """Whether this process is rank 0, by what the launchers leave in the environment."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    if rank is not None:
        return rank == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
