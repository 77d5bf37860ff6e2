"""Weights times a mask, which stand in the parameters while a network runs with them."""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightspan.core.devices import wide
from lightspan.core.sharded import local
from lightspan.optim.masks.place import Place
from lightspan.subspaces.masks.maps import SoftMask


class WeightsInUse:
    """Between `put` and `back` the parameters hold the weights in use; the module's state_dict always has the weights
    themselves: checkpoints are written at any time, also while the module is validated.

    Args:
        places: the parameters that have a mask, by name.
    """

    def __init__(self, module: nn.Module, places: Mapping[str, Place]) -> None:
        self._module, self._places = module, places
        self._names = first_names(module)
        self._kept: dict[str, Tensor] = {}
        self._inside = False
        hook = partial(_show_weights, weakref.ref(self), weakref.ref(module))
        self._handle = module.register_state_dict_post_hook(hook)

    @torch.no_grad()
    def put(self, factor: Callable[[str], Tensor]) -> None:
        """Puts weight times factor into the parameters; does nothing if it has."""
        if self._inside:
            return
        self._inside = True
        _reshard(self._module)
        for name, place in self._places.items():
            if name not in self._kept:
                self._kept[name] = torch.empty_like(place.parameter.detach())
            weight_S = place.weight
            local(self._kept[name]).copy_(weight_S)
            weight_S.copy_(SoftMask(factor(name)).push(wide(weight_S)))

    @torch.no_grad()
    def back(self) -> None:
        """Puts the weights back; does nothing if they are there."""
        if not self._inside:
            return
        self._inside = False
        _reshard(self._module)
        for name, place in self._places.items():
            place.weight.copy_(local(self._kept[name]))

    def free(self) -> None:
        """Frees the memory of the copies, after which `put` can be called again."""
        assert not self._inside
        self._kept = {}

    def close(self) -> None:
        """For good: weights are back, the module is as if this had never been."""
        self.back()
        self.free()
        self._handle.remove()


def first_names(module: nn.Module) -> dict[str, str]:
    """The name that a parameter has first, by each of its names: several modules may share one."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def _show_weights(
    of: "weakref.ref[WeightsInUse]",
    trained: "weakref.ref[nn.Module]",
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
) -> None:
    """A copy of the module, hook and all, is left alone."""
    weights = of()
    if weights is not None and weights._inside and trained() is module:
        for name, first in weights._names.items():
            if first in weights._kept and prefix + name in state_dict:
                state_dict[prefix + name] = weights._kept[first]


def _reshard(module: nn.Module) -> None:
    """A sharded module may hold on to gathered parameters after a forward pass, and would not see what is written."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
