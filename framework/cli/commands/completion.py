"""`lightspan completion SHELL`: a script with which a shell completes verbs, options, recipes, overlays and settings.

The script knows none of these: at every press of Tab it asks this verb, so what it offers is what is installed.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

from lightspan.cli.commands.arguments import file, folder
from lightspan.cli.commands.verbs import VERBS, Verb, verb_of
from lightspan.cli.config.flags import split_flags
from lightspan.cli.config.recipes import catalogue_names
from lightspan.cli.config.resolve import merged
from lightspan.core.errors import UserError, one_line, printable

SHELLS = ("bash", "zsh", "fish")
_PLAIN = re.compile(r"[\w./:=+,@%-]+")
"""Words that mean themselves to every shell; settings have the names that a recipe of somebody else gives them."""


class Candidate(NamedTuple):
    """A word that may stand there, and its meaning. A word that goes on ends in `.`, a setting in `=`."""

    word: str
    meaning: str = ""


class Completion(NamedTuple):
    """What may stand there: candidates, and "files", "folders" or "nothing" besides."""

    candidates: list[Candidate]
    places: str = "nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.add_argument(
        "--words",
        nargs=argparse.REMAINDER,
        metavar="WORD",
        help="the question of the script: what may stand for the last of these words? The first line of the answer is "
        "files, folders or nothing: what may stand there besides the candidates that follow",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the script, or the answer to its question."""
    if args.words is None:
        script = resources.files("lightspan.cli.commands").joinpath("completions", f"lightspan.{args.shell}")
        print(printable(script.read_text()), end="")
        return 0
    try:
        found = completion(args.words)
    except UserError:  # nobody reads messages while typing
        found = Completion([])
    print(printable(found.places))
    for word, meaning in found.candidates:
        if not _PLAIN.fullmatch(word):
            continue
        print(printable(word + (f"\t{one_line(meaning)}" if meaning and args.shell != "bash" else "")))
    return 0


def completion(words: Sequence[str]) -> Completion:
    """What may stand for the last of the words that follow `lightspan`. It is empty where no word has been begun.

    Raises: UserError for a recipe or an overlay among them that cannot be read.
    """
    *before, begun = words or [""]
    found = _behind_verb(before, begun) if before else _verbs()
    return found._replace(candidates=[one for one in found.candidates if one.word.startswith(begun)])


def _verbs() -> Completion:
    general = [Candidate("--help", "list the verbs"), Candidate("--version", "print the version")]
    return Completion([*(Candidate(verb.name, verb.help) for verb in VERBS if len(verb.words) == 1), *general])


def _behind_verb(before: Sequence[str], begun: str) -> Completion:
    verb = verb_of(before)
    if verb is None:
        return Completion([])
    longer = [Candidate(one.words[-1], one.help) for one in VERBS if one.words[:-1] == list(before)]
    found = _behind_words(verb, before, begun)
    return found._replace(candidates=[*longer, *found.candidates])


def _behind_words(verb: Verb, before: Sequence[str], begun: str) -> Completion:
    from lightspan.cli.main import parser_of

    actions = parser_of(verb)._actions
    options = {option: action for action in actions for option in action.option_strings}
    if before[-1] in options and options[before[-1]].nargs != 0:
        return _values(options[before[-1]])
    if begun.startswith("-"):
        return Completion([Candidate(option, action.help or "") for option, action in options.items()])
    plain = list(_plain_words(before[len(verb.words) :], options))
    places = [action for action in actions if not action.option_strings]
    if places and len(plain) >= len(places) and places[-1].nargs in ("+", "*"):
        return _values(places[-1])
    if len(plain) < len(places):
        return _values(places[len(plain)])
    return Completion(_settings(plain[0], before, begun)) if verb.flags else Completion([])


def _plain_words(words: Sequence[str], options: Mapping[str, argparse.Action]) -> Iterator[str]:
    """The words without options, their values, and flags."""
    _, rest = split_flags(list(words), [option for option, action in options.items() if action.nargs != 0])
    left = iter(rest)
    for word in left:
        if word in options:
            if options[word].nargs != 0:
                next(left, None)
        elif not word.startswith("-"):
            yield word


def _values(action: argparse.Action) -> Completion:
    """What an argument takes, as its choices, its metavar or its type say."""
    if action.choices is not None:
        return Completion([Candidate(str(choice)) for choice in action.choices])
    if action.metavar in ("RECIPE", "OVERLAY"):
        names = catalogue_names(overlays=action.metavar == "OVERLAY")
        return Completion([Candidate(name) for name in names], "files")
    if action.type is folder:
        return Completion([], "folders")
    return Completion([], "files" if action.type is file or action.metavar in ("CKPT", "SOURCE") else "nothing")


def _settings(recipe: str, words: Sequence[str], begun: str) -> list[Candidate]:
    """The settings of a recipe, one level of their names at a time."""
    overlays = [value for option, value in pairwise(words) if option in ("-c", "--config")]
    _, tree, _ = merged(recipe, overlays, ())
    branch, dot, _ = begun.rpartition(".")
    node = tree.at(tuple(branch.split("."))) if dot else tree
    if node is None or not isinstance(node.value, dict):
        return []
    return [
        Candidate(f"{branch}{dot}{key}.")
        if isinstance(child.value, dict) and child.value
        else Candidate(f"{branch}{dot}{key}=", "" if isinstance(child.value, dict | list) else f"now {child.value}")
        for key, child in node.value.items()
    ]
