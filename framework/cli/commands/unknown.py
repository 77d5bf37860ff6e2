"""What was probably meant by words of a command line that its verb does not know."""

import argparse
import difflib
import re
from collections.abc import Sequence

from lightspan.core.errors import UserError

_KEY = re.compile(r"[A-Za-z_]\w*(?:\.[\w-]+)+")
_OPTION = re.compile(r"--?([A-Za-z_]\w*)(?:=(.*))?", re.DOTALL)


def refuse_unknown(
    unknown: Sequence[str], given: Sequence[str], parser: argparse.ArgumentParser, recipe: Sequence[str] | None
) -> None:
    """Raises: UserError for the first of the unknown words, with the option or setting that is most like it.

    Args:
        unknown: what the parser did not know.
        given: all words, in their order.
        recipe: words of which one may name a recipe, whose settings are looked through; None for a verb without flags.
    """
    if not unknown:
        return
    word = unknown[0]
    after = [one for one in given[given.index(word) + 1 :] if one != "="] if word in given else []
    behind = after[0] if after else ""
    value = "VALUE" if not behind or behind.startswith("-") else behind
    ways = f"`{parser.prog} --help` lists the options"
    if recipe is not None and _KEY.fullmatch(word):
        raise UserError(f"{word} has no value; did you mean {word}={value}? Settings are written KEY=VALUE")
    if (match := _OPTION.fullmatch(word)) is None:
        raise UserError(f"{word!r} is one word too many; {ways}")
    name, own = match[1], match[2]
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    spelt = f"--{name.replace('_', '-')}"
    near = difflib.get_close_matches(spelt, options, n=1, cutoff=0.8) or [o for o in options if o.startswith(spelt)]
    meant = f"did you mean {near[0]}? " if near else ""
    if recipe is not None:
        key = _setting(name, recipe)
        form = f"{key}={own if own is not None else value}" if key else ""
        meant = f"did you mean {form}? " if form else meant or "settings are written KEY=VALUE with their whole path; "
    raise UserError(f"there is no option {word.partition('=')[0]}; {meant}{ways}")


def _setting(name: str, words: Sequence[str]) -> str | None:
    """The path of a setting of this name in the first of the words that is a recipe; None if there is none."""
    from lightspan.cli.config.check import settings_named
    from lightspan.cli.config.resolve import merged

    for word in words:
        try:
            _, root, _ = merged(word, [], [])
        except UserError:
            continue
        return settings_named(name, root)
    return None
