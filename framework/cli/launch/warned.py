"""Runs another launcher and passes warnings on to it: torchrun ends with 1 whatever its ranks returned, and knows
SIGTERM alone.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightspan.training.signals import WARNINGS


def passing_warnings_on(command: Sequence[str], environment: Mapping[str, str], stopped: int) -> int:
    """Runs a launcher; its exit status, or `stopped` if a warning was passed on to it and it ended for that reason."""
    told: list[int] = []
    process = subprocess.Popen(command, env=environment)

    def pass_on(number: int, _: Any) -> None:
        told.append(number)
        if number != signal.SIGINT:  # which a terminal has sent to the launcher as well
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (*WARNINGS, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not told or status == 0:
        return status
    return 128 + signal.SIGINT if told[0] == signal.SIGINT else stopped


def main(words: Sequence[str] | None = None) -> int:
    """`python -m lightspan.cli.launch.warned --stopped 143 -- COMMAND ...`; a batch script runs it on each node."""
    parser = argparse.ArgumentParser(prog="lightspan.cli.launch.warned", allow_abbrev=False)
    parser.add_argument("--stopped", type=int, required=True, help="exit status after a warning")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(words)
    return passing_warnings_on(args.command, os.environ, args.stopped)


if __name__ == "__main__":
    sys.exit(main())
