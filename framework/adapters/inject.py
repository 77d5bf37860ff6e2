"""Adapters put into any model: which layers get one, what stays frozen, and the way back to plain layers.

adapt(model, ["*.query", "*.value"], SVFit(), train=["classifier.*"])
"""

import contextlib
import hashlib
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightspan.adapters.adapter import Adapted, Adapter, AdapterSpec
from lightspan.adapters.layers import TAKEN, is_open, known_kind, obstacle, weight_of
from lightspan.adapters.report import AdaptedLayer, Injection
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches, require_matches, suggestions
from lightspan.core.sharded import whole

# Their fast paths read the weights of their parts, so the forward of a part may not run.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def adapt(
    model: nn.Module,
    match: Sequence[str],
    spec: AdapterSpec,
    name: str = "default",
    train: Sequence[str] = (),
    show: bool = True,
) -> Injection:
    """Gives every matched layer an adapter and freezes everything else.

    Layers of other kinds that a pattern also matches (a block, a norm, a dropout) are skipped. BatchNorm and other
    layers whose parameters are frozen keep their running statistics: they are switched to eval, which `model.train()`
    undoes and `freeze_statistics` repeats. What an earlier call left trainable stays trainable.

    Args:
        model: changed in place.
        match: shell-style patterns of module names (`*` crosses dots).
        spec: which adapter, with its settings.
        name: of the adapter; a layer may have several under different names.
        train: patterns of parameters, by their names before adapting, that train completely: a head, norms, biases.
        show: whether to print what is trained, on the first rank.
    Raises: UserError for a pattern that matches nothing or no layer that can be adapted, a name that is already used,
    and what the adapter itself refuses; the model is then as it was.
    """
    if not isinstance(spec, AdapterSpec):
        given = f"the class {spec.__name__}; write {spec.__name__}()" if isinstance(spec, type) else repr(spec)
        raise UserError(f"spec must be an adapter with its settings, such as LoRA(rank=8), not {given}")
    if known_kind(model) is not None:
        raise UserError(f"the model is itself a {_kind(model)}, which no name matches; pass nn.Sequential(model)")
    layers = dict(adaptable(model))
    names = _outside_adapters(model)
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    require_matches(match, names, f"module of {_kind(model)}", sizes=sizes)
    for pattern in match:
        if not any(matches(layer, [pattern]) for layer in layers):
            kinds = {_kind(model.get_submodule(module)) for module in names if matches(module, [pattern])}
            offered = ", ".join(map(repr, suggestions(f"{pattern}*", sizes))) or "none"
            raise UserError(
                f"pattern {pattern!r} matches only {', '.join(sorted(kinds))}; adapters take {TAKEN}; patterns that "
                f"match some here: {offered}"
            )
    parameters = [n for n, p in plain_tensors(model) if isinstance(p, nn.Parameter)]
    require_matches(train, parameters, f"parameter of {_kind(model)}", "train")
    specs = {layer: spec for layer in layers if matches(layer, match)}
    injection = plan(model, specs, name, {n for n in parameters if matches(n, train)}).carry_out()
    if show:
        injection.print()
    return injection


@dataclass(frozen=True)
class AdapterPlan:
    """Adapters that are built but not yet in the model, so that everything is checked before the model changes.

    Attributes:
        adapters: by the plain name of their layer; the content of a file is loaded into them here.
        train: plain names of parameters that train completely.
    """

    model: nn.Module
    name: str
    adapters: dict[str, Adapter]
    train: set[str]

    def carry_out(self) -> Injection:
        """Inserts the adapters into the model and freezes what does not train."""
        parameters = {n: p for n, p in plain_tensors(self.model) if isinstance(p, nn.Parameter)}
        goes_on = bool(adapted_layers(self.model))
        for parameter_name, parameter in parameters.items():
            parameter.requires_grad_((goes_on and parameter.requires_grad) or parameter_name in self.train)
        parents = list(self.model.modules())
        rows = []
        for layer, adapter in self.adapters.items():
            target = self.model.get_submodule(layer)
            if not isinstance(target, Adapted):
                base, target = target, Adapted(target, layer)
                _replace(parents, base, target)
            target.add(self.name, adapter)
            trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
            rows.append(AdaptedLayer(layer, adapter.layer.weight, trainable))
        freeze_statistics(self.model)
        _watch_saving(self.model)
        others = {n: p.numel() for n, p in parameters.items() if p.requires_grad}
        return Injection(self.name, tuple(rows), others, sum(p.numel() for p in parameters.values()))


def plan(model: nn.Module, specs: Mapping[str, AdapterSpec], name: str, train: set[str]) -> AdapterPlan:
    """Builds an adapter for each layer, and changes nothing.

    Args:
        specs: by the plain name of a layer that `adaptable` gives.
        train: plain names of parameters that train completely.
    Raises: UserError for a name that is already used, a layer or parameter that cannot train, and what an adapter
    refuses.
    """
    chosen = {layer: model.get_submodule(layer) for layer in specs}
    if taken := [layer for layer, m in chosen.items() if isinstance(m, Adapted) and name in m.adapters]:
        raise UserError(f"{taken[0]} already has an adapter named {name!r}; choose another name")
    bases = {layer: m.base if isinstance(m, Adapted) else m for layer, m in chosen.items()}
    for layer, base in bases.items():
        if reason := obstacle(base):
            raise UserError(f"{layer} ({_kind(base)}) cannot have an adapter: {reason}")
        # Where all is made on it, nothing is to have numbers: a plan.
        if weight_of(base).is_meta and torch.get_default_device().type != "meta":
            raise UserError(f"{layer} is on the meta device, which has no numbers; load the weights first")
    for parameter, tensor in plain_tensors(model):
        if parameter in train and not tensor.is_floating_point():
            raise UserError(f"{parameter} has {tensor.dtype} numbers, which have no gradient; leave it out of train")
    built = {layer: spec.build(bases[layer], layer) for layer, spec in specs.items()}
    for layer, adapter in built.items():
        adapter.spec = specs[layer]
    beside = {n: chosen[n] for n, adapter in built.items() if not (adapter.mergeable and is_open(bases[n]))}
    _refuse_weight_readers(model.modules(), beside)
    return AdapterPlan(model, name, built, train)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers that have adapters, by the name they had without them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer of a kind that adapters take, or that has one already."""
    for name in _outside_adapters(model):
        module = model.get_submodule(name)
        if isinstance(module, Adapted) or known_kind(module) is not None:
            yield name, module


def _outside_adapters(model: nn.Module) -> list[str]:
    """Names of the modules below `model`, as without adapters."""
    inside = tuple(f"{name}." for name in adapted_layers(model))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def plain_tensors(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that belong to no adapter, by their names without adapters. Those that several
    modules share appear once, under the first of their names, or under each of them with `every_name`.
    """
    once = not every_name
    adapted = {n for n, m in model.named_modules(remove_duplicate=once) if isinstance(m, Adapted)}
    parameters = list(model.named_parameters(remove_duplicate=once))
    buffers = set(model.state_dict(keep_vars=True)) - {name for name, _ in parameters}
    for name, tensor in [*parameters, *((n, b) for n, b in model.named_buffers(remove_duplicate=once) if n in buffers)]:
        owner, _, rest = name.rpartition(".base.")
        if owner in adapted:
            yield f"{owner}.{rest}", tensor
        elif not any(name.startswith(f"{layer}.adapters.") for layer in adapted):
            yield name, tensor


def freeze_statistics(model: nn.Module) -> None:
    """Switches layers with running statistics whose parameters are all frozen (BatchNorm) to eval, in which they keep
    them. For loops that call `model.train()`; a Lightning Trainer leaves modes as they are.
    """
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if frozen and getattr(module, "running_mean", None) is not None:
            module.eval()


def frozen_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bits of everything in the model that does not train: parameters without
    gradient and saved buffers, without adapters. Equal before and after training, unless something frozen changed.

    Sharded models gather one tensor at a time; all ranks must call it and get the same.
    """
    return digest((n, t) for n, t in plain_tensors(model) if not t.requires_grad)


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors, whatever their order, device and sharding."""
    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        full = whole(tensor)
        if is_traceable_wrapper_subclass(full):  # a quantised tensor: the tensors it is made of
            made_of: Any = full
            parts = {f"{name}.{part}": getattr(made_of, part) for part in made_of.__tensor_flatten__()[0]}
            total.update(digest(parts.items()).encode())
            continue
        total.update(f"{name} {full.dtype} {tuple(full.shape)}\n".encode())
        total.update(full.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before `adapt`, bit for bit."""
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def activate(model: nn.Module, *names: str) -> None:
    """Activates exactly the named adapters, in every layer that has them. Raises: UserError for an unknown name."""
    layers = adapted_layers(model).values()
    known = sorted({name for layer in layers for name in layer.adapters})
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"no layer has an adapter named {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    for layer in layers:
        layer.unmerge()
        layer.active = [name for name in names if name in layer.adapters]


def merge(model: nn.Module) -> None:
    """Merges every layer's active adapters: one product per layer, until `unmerge`.

    Raises: UserError for a change that is not of the weight; the model is then unchanged.
    """
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.require_mergeable(layer.active)
    for layer in layers:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def fold(model: nn.Module) -> None:
    """Restores plain layers, with the changes of active adapters written into their weights.

    Raises: UserError for a weight that other modules share, which would change with it, and for a change that is not
    of the weight; the model is then unchanged.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        layer.require_mergeable(layer.active)
        for other, module in model.named_modules():
            if module is not layer.base and any(t is layer.base.weight for t in module.parameters(recurse=False)):
                raise UserError(f"the weight of {name} is shared with {other}, which would change too; untie them")
    parents = list(model.modules())
    for layer in layers.values():
        layer.absorb(list(layer.active))
        _replace(parents, layer, layer.base)
    _stop_watching(model)


def remove(model: nn.Module) -> None:
    """Restores the plain layers as they were before `adapt`; the adapters and their changes are lost."""
    parents = list(model.modules())
    for layer in adapted_layers(model).values():
        _replace(parents, layer, layer.base)
    _stop_watching(model)


def _replace(parents: Iterable[nn.Module], old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in every place of `old`, so that a layer used twice is adapted in both."""
    for parent in parents:
        # Not named_children(), which skips a child's second name.
        for slot in [slot for slot, child in parent._modules.items() if child is old]:
            setattr(parent, slot, new)


def _watch_saving(model: nn.Module) -> None:
    """Makes `save_pretrained` of transformers' and diffusers' models warn that what it writes contains adapters."""
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)) and adapted_layers(module):
            # A bound method, since copies of the model then get one that is bound to them.
            module.save_pretrained = types.MethodType(_save_with_warning, module)  # type: ignore[assignment]


def _stop_watching(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)


def _save_with_warning(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    if adapted_layers(model):
        warnings.warn(
            f"{_kind(model)}.save_pretrained writes layers that have adapters under other names, so from_pretrained "
            f"would initialise them at random, without the change; fold(model) first, or use save_peft or save_adapter "
            f"for the adapters only ({save_directory})",
            stacklevel=2,
        )
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def _refuse_weight_readers(parents: Iterable[nn.Module], chosen: dict[str, nn.Module]) -> None:
    for parent in parents:
        for name, layer in chosen.items():
            if isinstance(parent, READS_WEIGHTS) and any(part is layer for part in parent.modules()):
                raise UserError(
                    f"{name} is part of {_kind(parent)}, which reads its weight instead of calling it, and this "
                    "adapter's change is not that of a weight that can be read; leave it out, or choose one that "
                    "can be merged"
                )


def _kind(module: nn.Module) -> str:
    return type(module).__name__
