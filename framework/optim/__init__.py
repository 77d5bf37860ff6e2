"""Optimisers, listed and made by name: `lightspan.optim.list()`, `lightspan.optim.create("factored_muon", model)`."""

from typing import TYPE_CHECKING, Any

from lightspan.core import classes

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterable

    from torch import nn
    from torch.optim import Optimizer

    from lightspan.optim.groups import ParameterGroups


def list() -> "builtins.list[classes.ClassEntry]":
    """Every optimiser by name, with one line and its paper; read from the sources, without importing torch."""
    return classes.list_classes("lightspan.optim", "torch.optim.optimizer.Optimizer", {"lightspan.optim.reference"})


def create(
    name: str,
    model_or_parameters: "nn.Module | Iterable[Any]",
    *,
    groups: "ParameterGroups | None" = None,
    **settings: Any,
) -> "Optimizer":
    """The optimiser with this name, in any case, with or without underscores.

    Args:
        name: one of `list()`, such as "factored_muon" or "FactoredMuon".
        model_or_parameters: of a model, norms, biases and embeddings are neither decayed nor projected; see
            `lightspan.optim.groups`. Parameters, named parameters or groups of either go to the optimiser as they are.
        groups: how a model is split into groups; None means `ParameterGroups()`.
        settings: those of the optimiser, such as lr.
    Raises: UserError for an unknown name, with the nearest one or, where PyTorch has one of this name, with that; for
        settings that the optimiser does not take, and for `groups` without a model.
    """
    from torch import nn

    from lightspan.core.errors import UserError
    from lightspan.optim.groups import ParameterGroups

    entries = list()
    if not classes.named(name, (entry.name for entry in entries)) and (own := _of_torch(name)):
        raise UserError(
            f"no optimizer of lightspan has the name {name!r}, but PyTorch has torch.optim.{own}: call it, or for a "
            f"model ParameterGroups().optimizer(model, partial(torch.optim.{own}, lr=...)) of lightspan.optim.groups"
        )

    def make(parameters: "Iterable[Any]") -> "Optimizer":
        made: Optimizer = classes.create(name, entries, "optimizer", parameters, **settings)
        return made

    if isinstance(model_or_parameters, nn.Module):
        return (groups or ParameterGroups()).optimizer(model_or_parameters, make)
    if groups is not None:
        raise UserError("groups splits the parameters of a model, and these are parameters; give the model itself")
    return make(model_or_parameters)


def _of_torch(name: str) -> str | None:
    """The optimiser of PyTorch that is called so."""
    from torch import optim

    kinds = (kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, optim.Optimizer))
    return classes.named(name, (kind.__name__ for kind in kinds if kind is not optim.Optimizer))
