"""Methods, listed and made by name: `lightspan.methods.list()`, `lightspan.methods.create("simclr", backbone=...)`."""

from typing import TYPE_CHECKING, Any

from lightspan.core import classes

if TYPE_CHECKING:
    import builtins

    from lightspan.training.method import Method


def list() -> "builtins.list[classes.ClassEntry]":
    """Every method by name, with one line and its paper; read from the sources, without importing torch."""
    return classes.list_classes("lightspan.methods", "lightspan.training.method.Method")


def create(name: str, **settings: Any) -> "Method":
    """The method with this name, in any case, with or without underscores.

    Args:
        name: one of `list()`, such as "simclr" or "SimCLR".
        settings: those of its constructor, such as backbone, projector and optimizer.
    Raises: UserError for an unknown name, with the nearest one, or for settings that it misses or does not take.
    """
    made: Method = classes.create(name, list(), "method", **settings)
    return made
