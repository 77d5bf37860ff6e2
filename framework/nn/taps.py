"""Hidden features of a forward pass, without a second one and without an edit to the network."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lightspan.core.errors import UserError


def blocks_of(model: nn.Module, containers: Sequence[str]) -> list[nn.Module]:
    """The children of the named containers (`blocks`, or `layers.0.blocks`), in their order.

    Raises: UserError for a name that is not a container of `model`.
    """
    found: list[nn.Module] = []
    known = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    for name in containers:
        if name not in known:
            raise UserError(
                f"{type(model).__name__} has no container {name!r}; it has {', '.join(known) or 'none at all'}"
            )
        found += known[name].children()
    return found


@contextmanager
def tapped(modules: Sequence[nn.Module], keep: Callable[[Any], Any] = lambda output: output) -> Iterator[list[Any]]:
    """Inside, the output of each of these modules, or what is to be kept of it, is appended to the list whenever it is
    called.

    What torch.compile made runs uncompiled there: a graph that was compiled before knows nothing of new hooks.
    """
    outputs: list[Any] = []
    handles = [module.register_forward_hook(lambda *call: outputs.append(keep(call[-1]))) for module in modules]
    try:
        with _uncompiled():
            yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> AbstractContextManager[object]:
    # Without dynamo nothing is compiled, and its import takes seconds. A graph that is being compiled sees the hooks.
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
