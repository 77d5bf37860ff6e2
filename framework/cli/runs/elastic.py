"""The launcher behind `lightspan submit --to local --lose N`: when a rank is lost, it starts those that are left anew.

They continue from the last checkpoint. torchrun counts nodes in this way and never the ranks of one machine: it starts
as many again as there were, also where one of them has lost its GPU.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from subprocess import Popen
from types import FrameType

from lightspan.cli.launch.job import RESTARTS, Job
from lightspan.cli.runs.fits import gpus, started_ranks
from lightspan.core.errors import printable
from lightspan.training.signals import WARNINGS

MISTAKE = 2
"""Exit status of what a user can fix: the next start would meet it again."""
HANGING = 124
"""Exit status of all ranks when one of them hangs: the launcher cannot tell which."""
_LOOK_S = 0.1

Statuses = Sequence[int | None]
"""How the ranks of a start have ended (negative: by a signal), None for those that the launcher has ended."""


@dataclass(frozen=True)
class Loss:
    """One or more ranks that are gone.

    Attributes:
        ranks: their numbers in the start that they ended, which had `before` ranks.
        left: on how many ranks the run continues.
    """

    ranks: tuple[int, ...]
    before: int
    left: int

    def __str__(self) -> str:
        lost = ", ".join(map(str, self.ranks))
        those = f"rank {lost} of {self.before} is" if len(self.ranks) == 1 else f"ranks {lost} of {self.before} are"
        return f"{those} lost; the run continues from its last checkpoint on {self.left}"


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, what was lost until then, and why it did not continue, if it did not finish."""

    status: int
    losses: tuple[Loss, ...]
    reason: str = ""


def lost_ranks(statuses: Statuses) -> tuple[int, ...]:
    """The ranks that ended a start: those that were killed, or else the only one that failed. None of them if several
    failed by themselves at once or hang: then nobody knows which was the first.
    """
    killed = tuple(rank for rank, status in enumerate(statuses) if status is not None and status < 0)
    failed = tuple(rank for rank, status in enumerate(statuses) if status)
    alone = len(failed) == 1 and statuses[failed[0]] != HANGING
    return killed or (failed if alone else ())


def keep_running(
    start: Callable[[int, Mapping[str, str]], Statuses],
    counts: Sequence[int],
    lose: int,
    final: Collection[int] = (MISTAKE,),
    say: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Starts ranks again and again until they have finished, on fewer when some are lost.

    Args:
        start: starts a number of ranks, with these variables in their environment, and returns when all have finished
            or one has failed and the others have been ended.
        counts: the numbers of ranks that the run may have, from the largest down; it begins on the first.
        lose: how many may be lost in all.
        final: exit statuses after which nothing is started any more.
        say: gets a line about every loss, and about every start after a failure of all ranks.
    """
    places, lost, again = list(range(counts[0])), list[Loss](), RESTARTS
    ranks = counts[0]
    while True:
        statuses = start(ranks, _devices(places, counts[0]))
        failed = [status for status in statuses if status]
        if not failed:
            return Ended(0, tuple(lost))
        status = next((status for status in failed if status in final), failed[0])
        status = 128 - status if status < 0 else status
        if status in final:
            return Ended(status, tuple(lost))
        gone = lost_ranks(statuses)
        if not gone:
            if again == 0:
                return Ended(status, tuple(lost), f"it has failed {RESTARTS + 1} times on all of its ranks")
            again -= 1
            say(f"all {ranks} ranks failed; they start again, at most {again} times more")
            continue
        places = [place for rank, place in enumerate(places) if rank not in gone]
        ranks, before = max((count for count in counts if count <= len(places)), default=0), ranks
        lost.append(Loss(gone, before, ranks))
        if sum(len(loss.ranks) for loss in lost) > lose:
            return Ended(status, tuple(lost), f"more than {lose} of its ranks are lost")
        if not ranks:
            return Ended(status, tuple(lost), f"its batch cannot be shared among the {len(places)} ranks that are left")
        say(str(lost[-1]))


def _devices(places: Sequence[int], all_places: int) -> dict[str, str]:
    """The variable that shows a start only the GPUs that are not lost: a rank may be gone because its GPU is."""
    names = gpus()
    if len(places) == all_places or not names:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[place] for place in places if place < len(names))}


def local_command(job: Job) -> list[str]:
    """Starts the ranks of a job that may lose some on this machine, with this Python. Argument list, unquoted."""
    own = [f"--ranks={','.join(map(str, job.counts))}", f"--lose={job.lose}", f"--stopped={job.stopped}"]
    grace = [f"--grace={job.preemption.grace_s}"] if job.preemption else []
    return [sys.executable, "-m", "lightspan.cli.runs.elastic", *own, *grace, "--", *job.arguments]


def main(words: Sequence[str] | None = None) -> int:
    """Runs what `local_command` says; returns its exit status."""
    parser = argparse.ArgumentParser(prog="lightspan.cli.runs.elastic", allow_abbrev=False)
    parser.add_argument("--ranks", required=True, help="the numbers of ranks that the run may have, the largest first")
    parser.add_argument("--lose", type=int, required=True, help="how many may be lost")
    parser.add_argument("--stopped", type=int, default=143, help="exit status of a rank that was asked to stop")
    parser.add_argument("--grace", type=float, default=90.0, help="seconds for ranks to stop in order")
    parser.add_argument("words", nargs="+", help="what follows `lightspan`")
    args = parser.parse_args(words)
    command = (sys.executable, "-P", "-m", "lightspan", *args.words)
    told: list[int] = []
    running: list[Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        told.append(number)
        for process in running:
            process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    def start(ranks: int, variables: Mapping[str, str]) -> Statuses:
        if told:
            return [args.stopped]
        with started_ranks(command, ranks, None, variables) as processes:
            running[:] = processes
            if told:  # while they were started
                pass_on(told[-1], None)
            return _ended(processes, told, args.stopped, args.grace)

    def say(line: str) -> None:
        print(printable(f"lightspan: {line}"), file=sys.stderr, flush=True)

    counts, final = [int(count) for count in args.ranks.split(",")], (MISTAKE, args.stopped, 128 + signal.SIGINT)
    before = {number: signal.signal(number, pass_on) for number in (*WARNINGS, signal.SIGINT)}
    try:
        ended = keep_running(start, counts, args.lose, final, say)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended.reason:
        say(f"the run ends: {ended.reason}")
    return ended.status


def _ended(processes: Sequence["Popen[bytes]"], told: Sequence[int], stopped: int, grace_s: float) -> list[int | None]:
    """Waits for all of them, or until one fails by itself; ranks that are asked to stop have `grace_s` to do so."""
    until_s = math.inf
    while True:
        statuses = [process.poll() for process in processes]
        if told or stopped in statuses:
            until_s = min(until_s, time.monotonic() + grace_s)
        elif any(statuses):
            return statuses
        if None not in statuses:
            return statuses
        if time.monotonic() > until_s:
            return [stopped if status is None else status for status in statuses]
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(main())
