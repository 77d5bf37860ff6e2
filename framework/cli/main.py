"""The `lightspan` command.

Every verb's module is imported only when the verb is used, and none of these modules loads torch at import.
"""

import argparse
import contextlib
import importlib
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from lightspan import __version__
from lightspan.cli.commands.verbs import VERBS, Verb, verb_of
from lightspan.cli.launch.parent import end_with_launcher
from lightspan.core.errors import UserError, printable
from lightspan.training.signals import WARNINGS, remembered

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns its exit status: 0, 2 for what the user can fix, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if argv is None:  # the command itself; a program that calls this keeps its variables
        # The current folder may be a stranger's: what is started here imports from it by --allow-module alone.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # unencodable names must not crash
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # A scheduler may signal a job while it still loads its libraries: the signal must not kill it then.
        with _warned() if arguments[:1] == ["fit"] else contextlib.nullcontext():
            status = _run(arguments)
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
        verb = verb_of(arguments)
        if arguments[:1] in ([], ["--help"]) or (verb is not None and verb.only_prints):
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
    """Ends its help with the verb's examples, and reports errors like every other part of the command: in one line,
    without the usage.
    """

    def __init__(self, verb: Verb):
        super().__init__(
            prog=f"lightspan {verb.name}", description=verb.help[0].upper() + verb.help[1:] + ".", allow_abbrev=False
        )
        self.examples = verb.examples

    def format_help(self) -> str:
        return "\n  ".join((super().format_help() + "\nexamples:", *self.examples)) + "\n"

    def error(self, message: str) -> NoReturn:
        example = f", as in `{self.examples[0]}`" if "arguments are required" in message else ""
        raise UserError(f"{message}{example}; `{self.prog} --help` lists the options")


def parser_of(verb: Verb) -> argparse.ArgumentParser:
    """The parser of everything behind the verb, except for flags. Imports the verb's module."""
    parser = _Parser(verb)
    importlib.import_module(f"lightspan.cli.commands.{verb.module}").add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def valued_options(parser: argparse.ArgumentParser) -> set[str]:
    """Options with a value behind them."""
    return {option for action in parser._actions if action.nargs != 0 for option in action.option_strings}


def parse(verb: Verb, arguments: list[str]) -> argparse.Namespace:
    """What a verb's function gets for these arguments.

    Raises: UserError for arguments that the verb does not take; SystemExit after printing the help.
    """
    from lightspan.cli.commands.unknown import refuse_unknown
    from lightspan.cli.config.flags import split_flags

    parser = parser_of(verb)
    flags, rest = split_flags(arguments, valued_options(parser)) if verb.flags else ([], arguments)
    args, unknown = parser.parse_known_intermixed_args(rest)
    refuse_unknown(unknown, rest, parser, [word for word in rest if not word.startswith("-")] if verb.flags else None)
    if verb.flags:
        args.flags = flags
    args.command_line = ["lightspan", *verb.words, *arguments]
    return args


def _run(arguments: list[str]) -> int:
    arguments, words = _set_apart(arguments)
    arguments = [argument for argument in arguments if argument != "--debug"]
    verb = verb_of(arguments)
    if verb is None:
        return _without_verb(arguments)
    try:
        args = parse(verb, arguments[len(verb.words) :])
    except SystemExit:  # argparse has printed the help
        return 0
    if words is not None:
        args.words = words
    return int(getattr(importlib.import_module(f"lightspan.cli.commands.{verb.module}"), verb.run)(args))


def _set_apart(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """The words of another command line that `completion` is asked about, in which nothing is an option of this one:
    not even `--`, which argparse would leave out.
    """
    if arguments[:1] != ["completion"] or "--words" not in arguments:
        return arguments, None
    at = arguments.index("--words")
    return arguments[:at], arguments[at + 1 :]


def _without_verb(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"lightspan {__version__}")
        return 0
    if arguments and arguments[0] in ("-h", "--help", "help") and verb_of(arguments[1:]) is not None:
        return _run([*arguments[1:], "--help"])
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        from lightspan.core.spelling import nearest

        names = [verb.name for verb in VERBS]
        does = next((verb.name for verb in VERBS if arguments[0] in verb.help.split()[:1]), None)  # list, print, train
        meant = nearest(arguments[0], [*names, "--version", "--help"]) or (f"did you mean {does}? " if does else "")
        raise UserError(f"unknown verb {arguments[0]!r}; {meant}there are: {', '.join(names)}")
    print("usage: lightspan VERB ...   (lightspan VERB --help says more)\n")
    for verb in VERBS:
        print(printable(f"  {verb.name:<20} {verb.help}"))
    print("\nStart with: lightspan recipes; lightspan fit language/quickstart")
    return 0 if arguments else USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
