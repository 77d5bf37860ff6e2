"""Finds what is wrong with a merged configuration, from source alone: nothing is imported.

Names are judged by the gate in `allow`, which refuses what it cannot determine. Names, plain types and known ranges of
settings are checked here; the typed builder and the constructors check the rest later.
"""

import ast
import contextlib
import difflib
import gc
import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightspan.cli.config import allow, estimator_inputs
from lightspan.cli.config.annotations import (
    bound_arguments,
    class_names,
    dataclass_of,
    describe,
    fits,
    is_untyped,
    item_annotation,
    kinds_of,
    literal_choices,
    members,
    takes_class_itself,
    takes_only_plain,
)
from lightspan.cli.config.flags import NAME
from lightspan.cli.config.merge import CLASS_SETTINGS, KEYED
from lightspan.cli.config.parts import TRAINER
from lightspan.cli.config.problems import Problem
from lightspan.cli.config.secrets import find_secrets_and_placeholders
from lightspan.cli.config.signatures import Parameter, Signature, signature, signature_of
from lightspan.cli.config.tree import COMMAND_LINE, Key, KeyPath, Node, dotted, plain
from lightspan.core.source import Definition, descends, locate
from lightspan.core.spelling import nearest

RECIPES = {  # kind of recipe, which is the key that names its class -> the keys that it may have
    "model": ("seed_everything", "trainer", "model", "data"),
    "estimator": ("seed_everything", "estimator", "inputs"),
    "merger": ("seed_everything", "merger", "checkpoints"),
}
ROOT_KEYS = tuple(dict.fromkeys(key for keys in RECIPES.values() for key in keys))
KINDS = {  # what belongs where no annotation of ours says so
    "model": "lightning.pytorch.core.module.LightningModule",
    "data": "lightning.pytorch.core.datamodule.LightningDataModule",
    "estimator": "lightspan.evaluation.estimator.Estimator",
    "inputs": "lightspan.evaluation.features.input.Input",
    "merger": "lightspan.merging.merger.Merger",
    "callbacks": "lightning.pytorch.callbacks.callback.Callback",
    "logger": "lightning.pytorch.loggers.logger.Logger",
}
SCHEDULE = "torch.optim.lr_scheduler.LRScheduler"
STEPS = ("total_steps", "total_iters", "T_max", "max_steps", "num_steps", "num_training_steps")  # of a whole run
LONG_LIST = 15  # up to so many allowed names are listed; more only if no similar name was found
SPEC_KEYS = ("class_path", *CLASS_SETTINGS)


def kind_of(keys: Container[str]) -> str:
    """The kind of a recipe with these keys at its root: "model", unless it names an "estimator" or a "merger"."""
    return next((kind for kind in RECIPES if kind in keys and kind != "model"), "model")


def find_problems(root: Node, modules: Sequence[str] = ()) -> list[Problem]:
    """Every problem of a merged tree, in the order of the file.

    Args:
        root: the tree, entries removed by null already gone.
        modules: names given with --allow-module.
    """
    with _uncollected():
        problems = allow.gate(root, modules)
        problems += find_secrets_and_placeholders(root)
        checker = _Checker(modules, problems)
        checker.root(root)
    return list(dict.fromkeys(problems))


def settings_named(name: str, root: Node) -> str | None:
    """The path of the setting of this name in a merged tree, such as `trainer.max_steps`; None if no class has one."""
    with _uncollected():
        return _Checker((), []).path_of(name, root, RECIPES[kind_of(root.value)])


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """All syntax trees read meanwhile are kept; searching them for garbage takes longer than parsing them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Checker:
    def __init__(self, modules: Sequence[str], problems: list[Problem]) -> None:
        self.modules, self.problems = modules, problems

    def say(self, node: Node, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(node.where, dotted(path), message))

    def root(self, root: Node) -> None:
        kind = kind_of(root.value)
        allowed = RECIPES[kind]
        for key, node in root.value.items():
            if key not in allowed:
                meant = nearest(key, allowed) or self.further_down(key, root, allowed)
                self.say(node, (key,), f"unknown key; {meant}allowed here: {', '.join(allowed)}")
        seed = root.child("seed_everything")
        if seed is not None and (isinstance(seed.value, float | str | dict | list) or seed.value is None):
            self.say(seed, ("seed_everything",), f"must be a whole number, got {plain(seed)!r}")
        trainer = root.child("trainer")
        if trainer is not None:
            self.trainer(trainer)
        if (inputs := root.child("inputs")) is not None and kind == "estimator":
            self.keyed(inputs, ("inputs",))
            for name in inputs.value if isinstance(inputs.value, dict) else ():
                if not str(name).isidentifier():
                    self.say(inputs, ("inputs", name), "must be a name that `fit` accepts: letters, digits and _")
        if kind == "estimator" and not self.problems:  # the gate may have refused what would be read here
            self.problems += estimator_inputs.mismatched_inputs(root)
        if kind == "merger":
            self.checkpoints(root)
        for key in dict.fromkeys((kind, "data")):
            node = root.child(key) if key in allowed else None
            if node is None or node.value is None:
                if key == kind:
                    self.say(root, (key,), f"missing; a recipe names its {key} with class_path and init_args")
            elif not isinstance(node.value, dict) or "class_path" not in node.value:
                self.incomplete(node, (key,))
            else:
                self.spec(node, (key,), 0, [KINDS[key]])

    def further_down(self, key: Key, root: Node, allowed: Sequence[str]) -> str:
        """`did you mean trainer.max_steps?` for a key that is a setting of the trainer, or of a class that is named."""
        found = self.path_of(key, root, allowed)
        return f"did you mean {found}? " if found else ""

    def path_of(self, key: Key, root: Node, allowed: Sequence[str]) -> str | None:
        """The path of the setting of this name that lies least deep; None if there is none."""
        if (begun := next((one for one in allowed if one.startswith(f"{key}_")), None)) is not None:
            return begun  # seed_everything for seed
        owners: list[tuple[KeyPath, str]] = [(("trainer",), TRAINER)] if "trainer" in allowed else []
        for path, node in sorted(allow.class_paths(root), key=lambda found: len(found[0])):
            if path[0] in allowed and allow.refusal(node.value, self.modules) is None:
                owners.append(((*path[:-1], "init_args"), node.value))
        for path, owner in owners:
            known = signature(owner)
            if isinstance(known, Signature) and key in known.parameters:
                return dotted((*path, key))
        return None

    def inside(self, key: Key, given: dict[Any, Node], path: KeyPath) -> str:
        """`did you mean ...?` for a key that is a setting of a class named among these settings of another one."""
        for name, node in given.items():
            for within, class_node in sorted(allow.class_paths(node), key=lambda found: len(found[0])):
                known = signature(class_node.value) if allow.refusal(class_node.value, self.modules) is None else None
                if isinstance(known, Signature) and key in known.parameters:
                    return f"did you mean {dotted((*path, name, *within[:-1], 'init_args', key))}? "
        return ""

    def checkpoints(self, root: Node) -> None:
        node = root.child("checkpoints")
        if node is None or not isinstance(node.value, dict) or not node.value:
            self.say(node or root, ("checkpoints",), "must map names of your choice to paths of checkpoints")
            return
        for name, child in node.value.items():
            if not isinstance(child.value, str) or not child.value:
                message = "must be the path of a run folder, a .ckpt or a safetensors file"
                self.say(child, ("checkpoints", name), f"{message}, got {plain(child)!r:.80}")

    def trainer(self, node: Node) -> None:
        if not isinstance(node.value, dict):
            self.say(node, ("trainer",), f"must be a mapping of Trainer settings, got {plain(node)!r}")
            return
        others = {}
        for key, child in node.value.items():
            if ("trainer", key) in KEYED:
                self.keyed(child, ("trainer", key))
            else:
                others[key] = child
        known = signature(TRAINER)
        if isinstance(known, Signature):
            names = (name for name in known.parameters if ("trainer", name) not in KEYED)
            self.arguments(others, ("trainer",), Signature({n: known.parameters[n] for n in names}), "Trainer")

    def keyed(self, node: Node, path: KeyPath) -> None:
        if path[-1] == "logger" and isinstance(node.value, bool):
            return
        if not isinstance(node.value, dict):
            if node.value is not None:
                self.say(node, path, "must map a name of your choice to class_path and init_args")
            return
        if "class_path" in node.value:
            self.say(node, path, "give the entry a name: {my_name: {class_path: ..., init_args: ...}}")
            return
        for name, child in node.value.items():
            if not NAME.fullmatch(str(name)):  # in a flag of a job, more would be a value of the command line
                self.say(child, path, f"{str(name)[:80]!r} is no name that a flag can have: letters, digits, _ and -")
            if not isinstance(child.value, dict) or "class_path" not in child.value:
                others = [other for other, spec in node.value.items() if spec.child("class_path") is not None]
                self.incomplete(child, (*path, name), nearest(name, others))
            else:
                self.spec(child, (*path, name), 0, [KINDS[str(path[-1])]])

    def incomplete(self, node: Node, path: KeyPath, hint: str = "") -> None:
        found = (
            f"got the keys {', '.join(map(str, node.value))}"
            if isinstance(node.value, dict)
            else f"got {plain(node)!r}"
        )
        self.say(node, path, f"has no class_path, neither here nor in what it is based on; {hint}{found}")

    def spec(self, node: Node, path: KeyPath, bound: int, kinds: list[str]) -> None:
        """A mapping with class_path; `bound` leading arguments come from the caller (-1: all required ones). Its class
        descends from one of `kinds`; an empty list allows all.
        """
        for key, child in node.value.items():
            if key not in SPEC_KEYS:
                inner = node.child("init_args")
                hint = f"did you mean {dotted((*path, 'init_args', key))}? " if inner is not None else ""
                self.say(
                    child, (*path, key), f"unknown key beside class_path; {hint}allowed here: {', '.join(SPEC_KEYS)}"
                )
        class_node = node.value["class_path"]
        class_path = class_node.value
        settings = node.child("init_args") or Node({}, class_node.where)
        if not isinstance(settings.value, dict):
            if settings.value is not None:
                self.say(settings, (*path, "init_args"), f"must be a mapping, got {plain(settings)!r}")
            settings = Node({}, settings.where)
        if allow.refusal(class_path, self.modules) is not None:
            return  # the gate has said so; what would be said of its settings follows from that alone
        if absent := allow.missing_modules([module for module in self.modules if allow.under(class_path, module)]):
            self.say(class_node, (*path, "class_path"), absent[0])
            return
        found = locate(class_path)
        known = signature_of(found) if isinstance(found, Definition) else None
        if kinds and isinstance(found, Definition) and all(descends(found, kind) is False for kind in kinds):
            wanted = " or ".join(kind.split(".")[-1] for kind in kinds)
            article = "an" if wanted[0] in "AEIO" else "a"
            self.say(class_node, (*path, "class_path"), f"must be {article} {wanted}, but {class_path} is not")
        if known is None:
            self.untyped(settings, (*path, "init_args"))
            return
        owner = class_path.split(".")[-1]
        parameters = list(known.parameters.values())
        if bound < 0:
            bound = next((i for i, parameter in enumerate(parameters) if not parameter.required), len(parameters))
        if bound == 2 and SCHEDULE in kinds and [p.name for p in parameters[1:2] if p.name not in STEPS]:
            self.say(
                class_node,
                (*path, "class_path"),
                f"a method passes the run's number of steps second, but {owner} takes {parameters[1].name}; name a "
                f"schedule whose second argument is one of {', '.join(STEPS)}, such as "
                "lightspan.optim.schedules.WarmupCosine, or bind the others in your own function "
                "(optimizer, total_steps) and add --allow-module",
            )
            return
        for where in ("init_args", "dict_kwargs"):
            for parameter in parameters[:bound]:
                if (given_node := node.at((where, parameter.name))) is not None:
                    self.say(given_node, (*path, where, parameter.name), "the caller supplies this; leave it out")
        supplied = {parameter.name for parameter in parameters[:bound]}
        own = Signature({parameter.name: parameter for parameter in parameters[bound:]}, known.open)
        free = {name: child for name, child in settings.value.items() if name not in supplied}
        self.arguments(free, (*path, "init_args"), own, owner)
        extra = node.child("dict_kwargs")
        passed_on = extra.value if extra is not None and isinstance(extra.value, dict) else {}
        free = {name: child for name, child in passed_on.items() if name not in supplied}
        self.arguments(free, (*path, "dict_kwargs"), own, owner)
        given = {*settings.value, *passed_on}
        for parameter in own.parameters.values():
            if parameter.required and parameter.name not in given:
                annotation = parameter.annotation
                kind = f" ({describe(annotation, parameter.source)})" if annotation is not None else ""
                self.say(class_node, (*path, "init_args", parameter.name), f"missing, {owner} requires it{kind}")

    def arguments(self, given: dict[Any, Node], path: KeyPath, known: Signature, owner: str) -> None:
        for name, node in given.items():
            parameter = known.parameters.get(name)
            if parameter is None:
                if known.open:
                    self.passed_on(node, (*path, name), owner)
                else:
                    hint = nearest(name, known.parameters) or self.inside(name, given, path)
                    names = (
                        "" if hint and len(known.parameters) > LONG_LIST else ", ".join(known.parameters) or "nothing"
                    )
                    allowed = f"{owner} takes: {names}" if names else ""
                    self.say(node, (*path, name), f"unknown; {hint}{allowed}".rstrip())
            elif parameter.annotation is None:
                self.untyped(node, (*path, name))
            else:
                self.value(node, (*path, name), parameter.annotation, parameter)

    def passed_on(self, node: Node, path: KeyPath, owner: str) -> None:
        """A setting that the signature does not name: nobody knows where it goes, so it must be a plain value."""
        if isinstance(node.value, dict) and "class_path" not in node.value:
            self.say(node, path, f"{owner} does not declare it and passes it on; it may only be a plain value or list")
        self.untyped(node, path)

    def value(self, node: Node, path: KeyPath, annotation: ast.expr, parameter: Parameter) -> None:
        source = parameter.source
        if is_untyped(annotation, source):
            self.untyped(node, path)
        elif takes_class_itself(annotation, source) and (named := self.class_named(node)) is not None:
            self.say(
                node,
                path,
                f"takes the class {named} itself, which a configuration cannot give; write a short name such as "
                f"'relu' if {parameter.name} takes one, or: {allow.alternative_advice(source.name)}",
            )
        elif isinstance(node.value, dict) and "class_path" in node.value:
            if takes_only_plain(annotation, source):
                self.say(node, path, self.wrong_type(node, path, annotation, parameter))
            self.spec(node, path, bound_arguments(annotation, source) or 0, class_names(annotation, source))
        elif isinstance(node.value, dict) and "init_args" in node.value:
            self.incomplete(node, path)
        elif isinstance(node.value, str) and not takes_only_plain(annotation, source) and self.text(node, path):
            return
        elif fits(plain(node), annotation, source) is False:
            self.say(node, path, self.wrong_type(node, path, annotation, parameter))
        elif isinstance(node.value, dict) and (target := dataclass_of(annotation, source)) is not None:
            known = signature_of(target)
            if known is not None:
                self.arguments(node.value, path, known, getattr(target.node, "name", ""))
        elif isinstance(node.value, list | dict):
            self.items(node, path, annotation, parameter)

    def class_named(self, node: Node) -> str | None:
        """The class that a mapping with class_path or a text names, if it may be named at all."""
        class_path = node.child("class_path")
        name = node.value if class_path is None else class_path.value
        return name if isinstance(name, str) and "." in name and not allow.refusal(name, self.modules) else None

    def items(self, node: Node, path: KeyPath, annotation: ast.expr, parameter: Parameter) -> None:
        """The values of a list or mapping, each checked as it is declared."""
        for key, child in node.value.items() if isinstance(node.value, dict) else enumerate(node.value):
            item = item_annotation(annotation, parameter.source, str(key) if isinstance(node.value, dict) else key)
            if item is None:
                self.untyped(child, (*path, key))
            else:
                self.value(child, (*path, key), item[0], replace(parameter, annotation=item[0], source=item[1]))

    def wrong_type(self, node: Node, path: KeyPath, annotation: ast.expr, parameter: Parameter) -> str:
        value = plain(node)
        choices = [
            c
            for m, _ in members(annotation, parameter.source)
            for c in (literal_choices(m) or ())
            if "Literal" in ast.unparse(m)
        ]
        hint = nearest(value, choices) if isinstance(value, str) else ""
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            hint = f"write {int(value)}"
        if not hint and (kinds := kinds_of(annotation, parameter.source)):
            hint = class_path_hint(node, path, kinds)
        return f"must be {describe(annotation, parameter.source)}, got {value!r:.200}; {hint}".rstrip("; ")

    def untyped(self, node: Node, path: KeyPath) -> None:
        """A value of unknown type: plain data, because nobody knows what would happen to a class there."""
        if isinstance(node.value, dict):
            if "class_path" in node.value:
                self.say(node, path, "no class may be given here: the type is not declared")
            elif "init_args" in node.value and path[-1] != "init_args":
                self.incomplete(node, path)
            else:
                for key, child in node.value.items():
                    self.untyped(child, (*path, key))
        elif isinstance(node.value, list):
            for index, child in enumerate(node.value):
                self.untyped(child, (*path, index))
        elif isinstance(node.value, str):
            self.text(node, path)

    def text(self, node: Node, path: KeyPath) -> bool:
        """Whether a text was refused because a builder could mistake it for a class."""
        message = allow.text_refusal(node.value, self.modules)
        if message is not None:
            self.say(node, path, message)
        return message is not None


def class_path_hint(node: Node, path: KeyPath, kinds: Sequence[str]) -> str:
    """How to name one of these classes where `node` stands: the one that its value seems to mean, and all there are."""
    key = f"{dotted(path)}.class_path=" if node.where == COMMAND_LINE else "class_path: "
    names = {kind.rpartition(".")[2].lower(): kind for kind in kinds}
    meant = node.value.partition("(")[0].lower() if isinstance(node.value, str) else ""
    near = [meant] if meant in names else [name for name in names if len(meant) > 2 and meant in name]
    near = near or difflib.get_close_matches(meant, names, n=1)
    hint = f"did you mean {key}{names[near[0]]}? " if near else f"name a class with {key}MODULE.NAME; "
    modules = itertools.groupby((kind.rpartition(".") for kind in kinds), key=lambda parts: parts[0])
    return hint + "; ".join(f"{module} has {', '.join(name for *_, name in group)}" for module, group in modules)
