"""Names for a part of a module that stands deeper in it."""

from typing import Any

from torch import nn


def submodule_alias(place: str, doc: str) -> property:
    """A property that gives the submodule at a place such as "student.0": what a method calls its `backbone` while
    another module owns it, so that checkpoints hold it once, under the owner's name.
    """

    def submodule(module: nn.Module) -> Any:
        return module.get_submodule(place)

    return property(submodule, doc=doc)
