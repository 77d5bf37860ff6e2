"""Which key of a configuration caused an error during building."""

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from lightspan.cli.config.allow import class_paths, permission_advice
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.tree import KeyPath, Node, dotted
from lightspan.core.errors import UserError
from lightspan.core.source import Definition, locate

_PYTHON = Path(sysconfig.get_path("stdlib"))
_CALLERS = (
    "lightspan.cli.commands",
    "lightspan.cli.config",
    "lightspan.cli.planning",
)  # of the parts that a configuration names
_PARSER_KEY = re.compile(r'^(?:error: )?(?:Parser key|Validation failed: Key) "([^"]+)":?\s*(.*)$')
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed, .* to allow it\.")
_UNFIT = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
_STRUCTURE = (  # lines of a jsonargparse message that do not describe the mistake
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Problem with given class_path",
    "Subclass types expect",
    "Expected a <class 'NoneType'>",
    "a class path (str)",
    "a dict with",
)


def blame(constructed: type, error: Exception, resolved: Resolved) -> str:
    """One line for what a constructor said: file:line and key of its class or, if the message names a setting, of
    that setting; the class; the message.
    """
    name = f"{constructed.__module__}.{constructed.__qualname__}"
    known = unfit_batch(error)
    text = known or " ".join(str(error).split())[:1000] or "no message"
    kind = "" if known else _kind(error)
    said = text if isinstance(error, UserError) else f"{name}: {kind}{text}{own_line(error) if kind else ''}"
    for path, spec in _specs(resolved.tree, name):
        settings = spec.child("init_args")
        for key in re.findall(r"\w+", text):
            if settings is not None and (node := settings.child(key)) is not None:
                return f"{node.where} {dotted((*path, 'init_args', key))}: {said}"
        return f"{spec.value['class_path'].where} {dotted(path)}: {said}"
    return said


def own_line(error: BaseException) -> str:
    """` (my_pkg/method.py:12)`: the last line that an error, or what caused it, passed of code that is neither a
    library's nor Python's own, nor what calls such code here; empty where there is none.
    """
    found, here = "", Path.cwd()
    while not found:
        for frame, line in traceback.walk_tb(error.__traceback__):
            module, path = str(frame.f_globals.get("__name__")), Path(frame.f_code.co_filename)
            library = {"site-packages", "dist-packages"} & set(path.parts) or _PYTHON in path.parents
            if not library and path.is_file() and not module.startswith(_CALLERS):
                found = f" ({path.relative_to(here) if here in path.parents else path}:{line})"
        if (before := error.__cause__ or error.__context__) is None:
            break
        error = before
    return found


def unfit_batch(error: BaseException) -> str | None:
    """The message for a batch that torch's layers cannot take, where a setting mends it; None for any other error."""
    text = str(error)
    if found := re.search(r"expected input\[[^\]]*\] to have (\d+) channels, but got (\d+) channels", text):
        taken, given = found.groups()
        return (
            f"a convolution of the model takes {taken} channels and got {given}; give the network's first layer as "
            f"many as the images have (in_chans={given} of most networks), or the data as many as it takes"
        )
    if found := re.search(r"Input type \((.+?)\) and (?:bias|weight) type \((.+?)\) should be the same", text):
        given, taken = found.groups()
        return (
            f"a layer of the model computes in {taken} and got {given}; let the dataset give images as float32, or set "
            "trainer.precision to their type"
        )
    if found := re.search(r"input size per channel: \((.+?)\)\. Kernel size: \((.+?)\)\. Kernel size can't be", text):
        return (
            f"a layer of the model looks at {found[2]} pixels at a time and is given {found[1]}; take larger images "
            "(or views, or patches), or a network with fewer or smaller strides"
        )
    if "Expected more than 1 value per channel when training" in text:
        return (
            "a BatchNorm of the model got a single row, which has no variance; raise data.init_args.batch_size, so "
            "that each micro-batch of a rank has at least two"
        )
    passed = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "index out of range in self" in text and "embedding" in passed:
        return (
            "a number of the batch lies outside the table of an embedding, such as a token that the text encoder does "
            "not have; give it as many as the tokenizer has (vocab_size), and numbers from 0"
        )
    return None


def first_user_error(error: BaseException) -> UserError | None:
    """The UserError nearest to the start of a chain of `raise ... from`, whose own cause may be any error; None if the
    chain has none.
    """
    deeper = None if error.__cause__ is None else first_user_error(error.__cause__)
    return deeper or (error if isinstance(error, UserError) else None)


def _kind(error: Exception) -> str:
    """The kind of an error whose message alone does not say what is wrong with a value."""
    plain = isinstance(error, ValueError | TypeError | OSError) or type(error).__name__ == "MisconfigurationException"
    return "" if plain else f"{type(error).__name__}: "


def duplicate_callbacks(error: Exception, resolved: Resolved) -> str | None:
    """The message for two callbacks whose states Lightning would store under one key; None for any other error."""
    found = re.match(r"Found more than one stateful callback of type `(\w+)`", str(error))
    callbacks = (resolved.config.get("trainer") or {}).get("callbacks")
    if found is None or not isinstance(callbacks, dict):
        return None
    kind = found[1]
    names = [str(name) for name, spec in callbacks.items() if str(spec["class_path"]).rpartition(".")[2] == kind]
    last = names[-1] if names else "NAME"
    return (
        f"trainer.callbacks has {kind} more than once ({', '.join(names)}), and a checkpoint could not tell their "
        f"states apart; remove one, with trainer.callbacks.{last}=null, or give them other settings, if the class "
        "tells its states apart by these, as MaskLearning does by match"
    )


def _specs(root: Node, name: str) -> Iterator[tuple[KeyPath, Node]]:
    """The specifications whose class is defined under `name`."""
    for path, node in class_paths(root):
        found = locate(node.value) if isinstance(node.value, str) else None
        spec = root.at(path[:-1])
        if spec is not None and name in (node.value, found.name if isinstance(found, Definition) else None):
            yield path[:-1], spec


def deepest_cause(text: str, resolved: Resolved) -> str:
    """The complaint of a jsonargparse message about the innermost key, with the place where that key was written.

    The messages nest: a union lists the complaints of all its members, each under the key of the level above.
    """
    keys: list[tuple[int, str]] = []
    best = ((-1, False), "", text.strip())
    for line in text.splitlines():
        content = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip(" "))
        while keys and keys[-1][0] >= indent:
            keys.pop()
        match = _PARSER_KEY.match(content)
        if match:
            keys.append((indent, match[1]))
            content = match[2]
        rank = (len(keys), not content.startswith("Not a valid subclass"))
        if content and not content.startswith(_STRUCTURE) and rank > best[0]:
            best = (rank, ".init_args.".join(key for _, key in keys), content)
    _, key, complaint = best
    complaint = _DENIED.sub(lambda found: f"{found[1]} may not be imported; {permission_advice(found[1])}", complaint)
    complaint = _UNFIT.sub(r"\1 is neither a subclass of \2 nor a function that is written with `-> \2`", complaint)
    where = next((place for path, place in resolved.sources.items() if path == key or path.startswith(key + ".")), "")
    return " ".join(part for part in (where, f"{key}:" if key else "", complaint) if part)
