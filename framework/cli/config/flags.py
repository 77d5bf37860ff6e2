"""Flags of the command line: `a.b.c=value`, `--a.b.c=value` and `--a.b.c value` mean the same, wherever they are."""

import re
from collections.abc import Collection, Sequence

from lightspan.cli.config.tree import COMMAND_LINE, MAX_DEPTH, Key, Node, parse
from lightspan.core.errors import UserError

_NAME = r"[A-Za-z_][\w-]*"
NAME = re.compile(_NAME)
"""What a flag can name as one part of a key."""
_KEY = rf"{_NAME}(?:\.[\w-]+)*"
_ASSIGNMENT = re.compile(rf"^({_KEY})=(.*)$", re.DOTALL)
_OPTION_WITH_VALUE = re.compile(r"^--([A-Za-z_]\w*(?:\.[\w-]+)+|seed_everything)=(.*)$", re.DOTALL)
_OPTION = re.compile(r"^--([A-Za-z_]\w*(?:\.[\w-]+)+|seed_everything)$")


def split_flags(arguments: list[str], valued: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Separates flags from all other arguments.

    Args:
        valued: options such as --run that take the next argument, whatever it looks like.
    Returns: (flags as `a.b.c=value`, the rest), each in the order given.
    Raises: UserError if `--a.b.c` has no value.
    """
    flags: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        token = arguments[position]
        position += 1
        if token == "--":
            rest += arguments[position:]
            break
        if token in valued:
            rest += [token, *arguments[position : position + 1]]
            position += 1
        elif _ASSIGNMENT.match(token):
            flags.append(token)
        elif match := _OPTION_WITH_VALUE.match(token):
            flags.append(f"{match[1]}={match[2]}")
        elif match := _OPTION.match(token):
            if position == len(arguments) or arguments[position].startswith("--"):
                raise UserError(f"{token} has no value; write {token} VALUE or {match[1]}=VALUE")
            flags.append(f"{match[1]}={arguments[position]}")
            position += 1
        else:
            rest.append(token)
    return flags, rest


def flag_layer(flags: list[str]) -> Node:
    """Flags as one layer; of two flags for one key the later wins.

    Raises: UserError for a flag without `=`, one whose key is nested too deep, or one that sets a key below a plain
        value.
    """
    root: dict[Key, Node] = {}
    for flag in flags:
        match = _ASSIGNMENT.match(flag)
        if match is None:
            raise UserError(f"flag {flag!r}: not of the form key.path=value")
        *parents, last = match[1].split(".")
        if len(parents) >= MAX_DEPTH:
            raise UserError(
                f"flag {flag[:40]!r}...: its key has {len(parents) + 1:,} levels, and the limit is {MAX_DEPTH}"
            )
        branch = root
        for key in parents:
            node = branch.setdefault(key, Node({}, COMMAND_LINE))
            if not isinstance(node.value, dict):
                raise UserError(f"flag {flag!r}: {key!r} was already set to {node.value!r} by an earlier flag")
            branch = node.value
        branch[last] = parse(match[2], COMMAND_LINE, line_numbers=False)
    return Node(root, COMMAND_LINE)


def allow_options(modules: Sequence[str]) -> list[str]:
    """--allow-module for each of the modules, as arguments for another command line."""
    return [word for module in modules for word in ("--allow-module", module)]
