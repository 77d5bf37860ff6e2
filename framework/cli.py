"""The `lightspan` command.

Every verb's module is imported only when the verb is used, and none of these modules loads torch at import.
"""

import argparse
import contextlib
import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from lightspan import __version__
from lightspan.errors import UserError, printable
from lightspan.launch.parent import end_with_launcher
from lightspan.signals import WARNINGS, remembered

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """A verb: the module of its `add_arguments` and of the function that runs it, whether it takes flags
    (`key.path=value`) anywhere on the line, and whether it only prints, so that a reader such as `head` may close the
    pipe early.
    """

    name: str
    help: str
    module: str
    run: str = "run"
    flags: bool = False
    only_prints: bool = False


VERBS = (
    Verb("recipes", "list the catalogue", "recipes", only_prints=True),
    Verb("show", "print a recipe, or its merged form", "show", flags=True, only_prints=True),
    Verb("copy", "copy a recipe to a file of your own", "copy"),
    Verb("check", "find every mistake before a run", "check", flags=True),
    Verb("new", "write the files of a new method", "new"),
    Verb("plan", "estimate memory before anything starts", "plan", flags=True),
    Verb("fit", "train", "fit", flags=True),
    Verb("run", "run a recipe that does not train (an estimator or a merger)", "run", flags=True),
    Verb("merge", "merge checkpoints given on the command line, in their own format", "merge"),
    Verb("submit", "train on a cluster: hand the run to SLURM, Kubernetes or torchrun", "submit", flags=True),
    Verb("validate", "measure a checkpoint on validation data", "evaluate", "run_validate", flags=True),
    Verb("test", "measure a checkpoint on test data", "evaluate", "run_test", flags=True),
    Verb("predict", "write the predictions of a checkpoint", "evaluate", "run_predict", flags=True),
    Verb("prove-resume", "show that a killed and resumed run equals a straight one", "prove_resume", flags=True),
    Verb(
        "intrinsic-dimension",
        "find how many random dimensions a recipe needs",
        "intrinsic_dimension",
        flags=True,
    ),
    Verb(
        "replay",
        "take a step again whose loss or gradient was not finite, and name where it begins",
        "replay",
        flags=True,
    ),
    Verb("report", "compare runs on one HTML page", "report"),
    Verb("audit", "look at the weights of a checkpoint, or at what changed between two", "audit"),
    Verb("export", "write a checkpoint for other libraries", "export"),
    Verb("fsck", "find damaged checkpoints of a run and move them out of the way", "fsck"),
    Verb("data", "pack a folder into shards, verify them, or write their indices", "data"),
    Verb("ledger", "account for the samples that a run consumed", "ledger", only_prints=True),
    Verb("doctor", "look for problems with this machine and installation", "doctor", only_prints=True),
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns its exit status: 0, 2 for what the user can fix, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        # A scheduler may signal a job while it still loads its libraries: the signal must not kill it then.
        with _warned() if arguments[:1] == ["fit"] else contextlib.nullcontext():
            status = _run([argument for argument in arguments if argument != "--debug"])
            sys.stdout.flush()  # a closed pipe is noticed here and not while Python shuts down
            return status
    except UserError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"lightspan: {printable(str(error))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("\nlightspan: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # from a worker, a service or a socket, unless it is standard output that nobody reads
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python has not flushed yet
        if arguments[:1] in ([], ["--help"], *([verb.name] for verb in VERBS if verb.only_prints)):
            return 0
        print("lightspan: stopped, because nothing reads its standard output any more", file=sys.stderr)
        return FAILED


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """How a run handles signals from the start until its Preemption callback takes over."""
    end_with_launcher()
    with remembered((*WARNINGS, signal.SIGINT)):
        yield


def _output_is_closed() -> bool:
    """Whether standard output is a pipe or socket that nothing reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or not a real file
        return False


class _Parser(argparse.ArgumentParser):
    """Reports errors like every other part of the command: in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


def _run(arguments: list[str]) -> int:
    verb = next((verb for verb in VERBS if arguments and arguments[0] == verb.name), None)
    if verb is None:
        return _without_verb(arguments)
    from lightspan.config.flags import split_flags

    module = importlib.import_module(f"lightspan.commands.{verb.module}")
    parser = _Parser(
        prog=f"lightspan {verb.name}", description=verb.help[0].upper() + verb.help[1:] + ".", allow_abbrev=False
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    valued = {option for action in parser._actions if action.nargs != 0 for option in action.option_strings}
    flags, rest = split_flags(arguments[1:], valued) if verb.flags else ([], arguments[1:])
    try:
        args = parser.parse_intermixed_args(rest)
    except SystemExit:  # argparse has printed the help
        return 0
    if verb.flags:
        args.flags = flags
    args.command_line = ["lightspan", *arguments]
    return int(getattr(module, verb.run)(args))


def _without_verb(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"lightspan {__version__}")
        return 0
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        from lightspan.config.problems import nearest

        names = [verb.name for verb in VERBS]
        raise UserError(f"unknown verb {arguments[0]!r}; {nearest(arguments[0], names)}there are: {', '.join(names)}")
    print("usage: lightspan VERB ...   (lightspan VERB --help says more)\n")
    for verb in VERBS:
        print(f"  {verb.name:<20} {verb.help}")
    print("\nStart with: lightspan recipes; lightspan fit language/quickstart")
    return 0 if arguments else USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
