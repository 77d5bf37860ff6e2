"""A Trainer function in a run folder: signals, ranks that meet again, and errors that a user can fix."""

import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.config.blame import unfit_batch
from lightspan.cli.config.build import Built, Resolved
from lightspan.cli.runs.folder import LAST_CHECKPOINT, is_first_rank
from lightspan.core.errors import UserError, printable
from lightspan.training.checkpoints.manifest import last_checkpoint_note

if TYPE_CHECKING:
    from lightning import LightningModule

INTERRUPTED = 130


def call(function: Callable[[], Any], built: Built, run_dir: Path, checkpoint: Path | None) -> tuple[int, Any]:
    """Runs a Trainer function; returns (exit status, its result) and turns what a user can fix into a UserError."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightspan.callbacks.resilience.preemption import Preempted
    from lightspan.core.distributed import end_process_group
    from lightspan.training.signals import installed

    flag = installed()
    try:
        result = function()
        end_process_group()
        return 0, result
    except Preempted as leaving:
        end_process_group()
        _say_stopped(str(leaving), run_dir)
        return int(leaving.code or 0), None
    except BaseException as error:
        # Lightning ends a run that was stopped by Ctrl-C with sys.exit(1), after teardown. A write that it interrupts
        # raises whatever its library raises.
        if built.trainer.interrupted and (
            isinstance(error, KeyboardInterrupt | SystemExit) or (flag is not None and flag.insisted)
        ):
            _say_stopped(f"stopped by Ctrl-C at step {built.trainer.global_step}", run_dir)
            return INTERRUPTED, None
        if isinstance(error, MisconfigurationException):
            raise UserError(f"the Trainer refuses this run: {error}") from error
        if isinstance(error, OSError):
            _explain(error, run_dir)
        if message := _reason(error, checkpoint):
            raise UserError(message) from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # Lightning sets this after Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _say_stopped(why: str, run_dir: Path) -> None:
    if is_first_rank():
        way_on = f"; the same command with --run {shlex.quote(str(run_dir))} continues from it"
        print(
            printable(f"\nlightspan: {why}; {last_checkpoint_note(run_dir / LAST_CHECKPOINT, way_on)}"),
            file=sys.stderr,
            flush=True,
        )


def _explain(error: OSError, run_dir: Path) -> None:
    """Raises a UserError for an error with a file in the run folder, or with a disk, but not with sockets and pipes."""
    from lightspan.core.files.atomic import explained_os_errors

    disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    if not isinstance(error.filename, str | os.PathLike):
        path = run_dir if disk else None
    else:
        path = Path(error.filename).absolute()
    if path is not None and (path == run_dir or run_dir in path.parents):
        with explained_os_errors(path):
            raise error


def _reason(error: BaseException, checkpoint: Path | None) -> str | None:
    """The message for a library's error that a user can fix, by where it was raised; None for all others."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError | ValueError | IndexError):
        return None
    if (said := unfit_batch(error)) is not None or isinstance(error, IndexError):
        return said
    passed = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if isinstance(error, ValueError) and "configure_optimizers" in passed:
        return f"the optimiser or its schedule refuses its settings: {error}"
    if "setup_data" in passed and "`val_check_interval`" in str(error):
        said = str(error).strip().replace("`check_val_every_n_epoch=None`", "trainer.check_val_every_n_epoch=null")
        return f"the Trainer refuses this run: {said}"
    if "_validate_condition_metric" in passed:
        return f"early stopping: {error}"
    from lightspan.cli.runs.start_checks import exhausted_schedule

    if (said := exhausted_schedule(error)) is not None:
        return said
    if checkpoint is not None and "load_state_dict" in passed:
        return f"{checkpoint} is a checkpoint of another model: {_few_lines(str(error))}"
    return None


def load_merged_weights(model: "LightningModule", path: Path) -> None:
    """Puts a safetensors file's weights into the model, all of them, as a merge or an export wrote them.

    Raises: UserError for a file that is not whole, or belongs to another model.
    """
    from lightspan.core.ties import require_ties
    from lightspan.merging.weights import open_weights
    from lightspan.training.checkpoints.fit import check_fits

    weights = open_weights(path)
    state = {name: weights.read(name) for name in weights.forms}
    check_fits(state, model, str(path), way_out="use it with the recipe whose runs were merged or exported")
    require_ties(model, state.__getitem__, str(path))
    model.load_state_dict(state)


def check_at_start(built: Built) -> None:
    """Has the run looked at once more when everything is set up, before its first step."""
    from lightspan.cli.runs.start_checks import StartChecks

    # First, since Lightning wants callbacks that write checkpoints last.
    built.trainer.callbacks.insert(0, StartChecks())  # type: ignore[attr-defined]  # a connector of the trainer sets it


def check_checkpoints(built: Built) -> None:
    """Has the checkpoint that a run loads checked, also where the recipe has no `Checkpoint`, which does the same."""
    from lightspan.training.checkpoints.io import use_whole_files

    use_whole_files(built.trainer.strategy)


def has_no_steps(resolved: Resolved) -> bool:
    """Whether a configuration asks for a run of no steps, which writes the weights before the first one."""
    trainer = resolved.config.get("trainer", {})
    return 0 in (trainer.get("max_steps"), trainer.get("max_epochs"))


def stop_at_start(built: Built, path: Path) -> None:
    """Has the run end before its first step, with a checkpoint of the weights at `path`."""
    from lightspan.cli.runs.untrained import Untrained

    built.trainer.callbacks.insert(0, Untrained(path))  # type: ignore[attr-defined]  # a connector of the trainer sets it


def obey_signals(built: Built) -> None:
    """Leaves signals to the run's callback that obeys them, or restores their usual meaning."""
    from lightspan.callbacks.resilience.preemption import Preemption
    from lightspan.training.signals import installed

    callbacks = built.trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    preemption = next((callback for callback in callbacks if isinstance(callback, Preemption)), None)
    if preemption is not None:
        preemption.obey(built.trainer)
    elif (flag := installed()) is not None:
        flag.release()


def meet_under_new_keys(built: Built) -> None:
    """Ranks that torchrun starts meet under keys that no earlier start of theirs has used.

    torchrun keeps its store on a restart (torch 2.13), and under its default keys a rank can find the address of one
    that was killed, and wait for it in vain. Its count of restarts is no help: each node counts for itself, and not
    those that another node asked for. Lightning uses an existing process group as it is.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # otherwise rank 0 makes a new store
    import torch.distributed as dist

    from lightspan.core.meeting import agreed_key

    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    store = dist.TCPStore(address, port, ranks, is_master=False)
    key = agreed_key(store, rank, ranks)
    on_cpu = built.trainer.strategy.root_device.type == "cpu"
    backend = "gloo" if on_cpu else "nccl"
    dist.init_process_group(backend, store=dist.PrefixStore(key, store), rank=rank, world_size=ranks)


def _few_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line if len(line) < 300 else line[:297] + "..." for line in lines[:4])
