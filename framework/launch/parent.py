"""A rank ends with the launcher that started it: without it nothing would end the rank or restart it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_launcher(number: signal.Signals = signal.SIGTERM) -> bool:
    """Asks the kernel for a signal when the parent ends; returns whether it will send one.

    Only for ranks that torchrun, Lightning or `lightspan` started, on Linux: a run that a shell started continues
    when the shell ends, and SLURM ends its tasks itself. The default is a scheduler's warning, so that the run stops
    with a checkpoint.
    """
    if sys.platform != "linux" or not _started_by_launcher():
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0


def _started_by_launcher() -> bool:
    return "LOCAL_RANK" in os.environ and "SLURM_STEP_ID" not in os.environ
