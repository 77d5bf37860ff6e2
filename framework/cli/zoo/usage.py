"""How a network from a zoo is used: lines of Python, and lines of a recipe, as a user would write them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightspan.cli.config.tree import dump
from lightspan.cli.zoo.index import ADAPTER, ZooNetwork, at_place

WITH_WEIGHTS = "lightspan.backbones.weights.with_weights"
LOAD_ADAPTER = "lightspan.adapters.state.load_adapter"


def in_python(network: ZooNetwork, file: Path) -> str:
    """A program that makes the network with its weights."""
    if network.kind == ADAPTER:
        lines = [f"encoder = {_call(network.network)}", f"load_adapter(encoder, {str(file)!r})"]
    else:
        lines = [f"encoder = with_weights({_call(network.network)}, {str(file)!r})"]
    loader = LOAD_ADAPTER if network.kind == ADAPTER else WITH_WEIGHTS
    imports = [_import(path) for path in sorted({loader, *_class_paths(network.network)})]
    return "\n".join([*imports, "", *lines])


def in_a_recipe(network: ZooNetwork, file: Path) -> str:
    """An overlay that starts a recipe from the weights; empty for an adapter, which is loaded in Python."""
    if network.kind == ADAPTER:
        return ""
    loaded = {"class_path": WITH_WEIGHTS, "init_args": {"path": str(file), "module": dict(network.network)}}
    return dump(at_place(network.place, loaded)).rstrip()


def _call(value: Any) -> str:
    """A value as an expression: a network as a call of what its class path names."""
    if isinstance(value, Mapping):
        settings = ", ".join(f"{key}={_call(one)}" for key, one in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({settings})"
    return f"[{', '.join(map(_call, value))}]" if isinstance(value, list | tuple) else repr(value)


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield value["class_path"]
        value = list(value.get("init_args", {}).values())
    for one in value if isinstance(value, list | tuple) else ():
        yield from _class_paths(one)


def _import(path: str) -> str:
    module, _, name = path.rpartition(".")
    return f"from {module} import {name}"
