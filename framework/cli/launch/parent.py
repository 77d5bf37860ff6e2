"""A rank ends with the launcher that started it, and a run with the sweep: nothing else would end it or restart it."""

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "LIGHTSPAN_PARENT"
"""Tells a command that another lightspan started the number of that process."""
_PR_SET_PDEATHSIG = 1


def end_with_launcher(number: signal.Signals = signal.SIGTERM) -> bool:
    """Asks the kernel for a signal when the parent ends; returns whether it will send one.

    Only for ranks that torchrun, Lightning or `lightspan` started, on Linux: a run that a shell started continues
    when the shell ends, and SLURM ends its tasks itself. The default is a scheduler's warning, so that the run stops
    with a checkpoint. A parent that has ended already counts too.
    """
    parent = os.environ.get(PARENT_VARIABLE, "")
    is_rank = "LOCAL_RANK" in os.environ and "SLURM_STEP_ID" not in os.environ
    if sys.platform != "linux" or not (is_rank or parent):
        return False
    asked = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0
    if asked and parent and not is_rank and str(os.getppid()) != parent:
        os.kill(os.getpid(), number)
    return asked
