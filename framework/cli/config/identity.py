"""Whether two configurations are the same experiment: what a resumed run may change, and what it may not.

A callback may come, go and change if its class says, in its own body, `alters_training = False`: with it and without
it, every step is the same bit for bit. This is read from the source, without importing it, and not inherited. A class
that says nothing is compared. Lightning's classes say nothing; `parts` says it for them.
"""

import ast
from collections.abc import Iterator
from typing import Any

from lightspan.cli.config.parts import WATCHING
from lightspan.core.source import Definition, locate

# How long, where and with which reports a run continues; none of them alters the steps themselves.
FREE = (
    "about",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.profiler",
)
FREE_NAMES = ("num_workers",)
_UNSET = object()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two configurations that matter, as `key: before -> now`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    free = (*FREE, *_free_callbacks(before, now))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, _UNSET) != new.get(key, _UNSET) and not _is_free(key, free):
            lines.append(f"{key}: {_shown(old, key)} -> {_shown(new, key)}")
    return lines


def alters_training(spec: Any) -> bool:
    """Whether a callback, given with its class_path, may alter the steps of a run: yes, unless it says that it
    does not.
    """
    class_path = spec.get("class_path") if isinstance(spec, dict) else None
    found = locate(class_path) if isinstance(class_path, str) else None
    if not isinstance(found, Definition) or not isinstance(found.node, ast.ClassDef):
        return True
    for statement in found.node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "alters_training" for target in targets):
            return ast.unparse(statement.value or ast.Constant(None)) != "False"  # type: ignore[attr-defined]
    return found.name not in WATCHING


def _free_callbacks(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys of those callbacks that alter no step, neither in the old configuration nor in the new."""
    old, new = _callbacks(before), _callbacks(now)
    specs = {name: [side[name] for side in (old, new) if side.get(name) is not None] for name in {*old, *new}}
    return [f"trainer.callbacks.{name}" for name, given in specs.items() if not any(map(alters_training, given))]


def _callbacks(config: dict[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer")
    found = trainer.get("callbacks") if isinstance(trainer, dict) else None
    return found if isinstance(found, dict) else {}


def _is_free(key: str, free: tuple[str, ...]) -> bool:
    return key.split(".")[-1] in FREE_NAMES or any(key == name or key.startswith(name + ".") for name in free)


def _shown(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not set"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif path not in ("trainer", "trainer.callbacks") or value:
        yield path, value
