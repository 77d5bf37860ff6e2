"""Adapters put into any model: which layers get one, what stays frozen, and the way back to plain layers.

adapt(model, ["*.query", "*.value"], SVFit(), train=["classifier.*"])
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapted, AdapterSpec
from lightspan.adapters.layers import TAKEN, supported, whole
from lightspan.adapters.report import Injection, Row
from lightspan.errors import UserError
from lightspan.patterns import matches, require_matches

# Their fast paths read the weights of their parts, so a part's own forward need not run.
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

    Layers of other kinds that a pattern also matches (a block, a norm, a dropout) are passed over. BatchNorm and other
    layers whose parameters are frozen keep their running statistics: they are switched to eval, which `model.train()`
    undoes and `freeze_statistics` does again. What an earlier call left to train goes on training.

    Args:
        model: changed in place.
        match: shell-style patterns of module names (`*` crosses dots).
        spec: which adapter, with its settings.
        name: of the adapter; a layer may carry several under different names.
        train: patterns of parameters, as they were named before, that train as a whole: a head, norms, biases.
        show: whether to print what is trained, on the first rank.
    Raises: UserError for a pattern that matches nothing or no layer that can be adapted, a name that is taken, and what
    the adapter itself refuses; the model is then as it was.
    """
    layers = dict(adaptable(model))
    inside = tuple(f"{layer}." for layer in adapted_layers(model))
    names = [module for module, _ in model.named_modules() if module and not module.startswith(inside)]
    require_matches(match, names, f"module of {_kind(model)}")
    for pattern in match:
        if not any(matches(layer, [pattern]) for layer in layers):
            kinds = {_kind(model.get_submodule(module)) for module in names if matches(module, [pattern])}
            raise UserError(f"pattern {pattern!r} matches only {', '.join(sorted(kinds))}; adapters take {TAKEN}")
    parameters = {n: p for n, p in plain_tensors(model) if isinstance(p, nn.Parameter)}
    require_matches(train, list(parameters), f"parameter of {_kind(model)}")
    chosen = {layer: module for layer, module in layers.items() if matches(layer, match)}
    if taken := [layer for layer, m in chosen.items() if isinstance(m, Adapted) and name in m.adapters]:
        raise UserError(f"{taken[0]} has an adapter named {name!r} already; choose another name")
    parents = list(model.modules())
    built = {layer: spec.build(m.base if isinstance(m, Adapted) else m, layer) for layer, m in chosen.items()}
    if not_mergeable := [layer for layer in built if not built[layer].mergeable]:
        _refuse_weight_readers(parents, {layer: chosen[layer] for layer in not_mergeable})
    for parameter_name, parameter in parameters.items():
        goes_on = bool(inside) and parameter.requires_grad
        parameter.requires_grad_(goes_on or matches(parameter_name, train))
    rows = []
    for layer, adapter in built.items():
        adapter.spec = spec
        target = chosen[layer]
        if not isinstance(target, Adapted):
            target = Adapted(target)
            _replace(parents, chosen[layer], target)
        target.add(name, adapter)
        trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        rows.append(Row(layer, adapter.layer.weight, trainable))
    freeze_statistics(model)
    others = {n: p.numel() for n, p in parameters.items() if p.requires_grad}
    injection = Injection(name, tuple(rows), others, sum(p.numel() for p in parameters.values()))
    if show:
        injection.print()
    return injection


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers that carry adapters, by the name they had without them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer that can be adapted, or is already."""
    inside = tuple(f"{name}." for name in adapted_layers(model))
    for name, module in model.named_modules():
        if name and not name.startswith(inside) and (isinstance(module, Adapted) or supported(module)):
            yield name, module


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that are no adapter's, under the names they had without adapters. Those that several
    modules share come once.
    """
    adapted = adapted_layers(model)
    buffers = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters()}
    tensors = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in buffers)]
    for name, tensor in tensors:
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
    gradient and saved buffers, adapters left out. Equal before and after training, or something frozen moved.

    Sharded models gather one tensor at a time; all ranks have to call it and get the same.
    """
    return digest((n, t) for n, t in plain_tensors(model) if not t.requires_grad)


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors, whatever their order, device and sharding."""
    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        full = whole(tensor)
        total.update(f"{name} {full.dtype} {tuple(full.shape)}\n".encode())
        total.update(full.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model gives what it gave before `adapt`, bit for bit."""
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
    """Puts exactly the named adapters to use, in every layer that has them. Raises: UserError for a name none has."""
    layers = adapted_layers(model).values()
    known = sorted({name for layer in layers for name in layer.adapters})
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"no layer has an adapter named {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    for layer in layers:
        layer.unmerge()
        layer.active = [name for name in names if name in layer.adapters]


def merge(model: nn.Module) -> None:
    """Merges every layer's active adapters: one product a layer, until `unmerge`."""
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def fold(model: nn.Module) -> None:
    """Makes plain layers again, with the changes of active adapters written into their weights.

    Raises: UserError for a weight that other modules share, which would change with it, and for a change that is none
    of the weight; the model is then as it was.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        layer.require_mergeable()
        for other, module in model.named_modules():
            if module is not layer.base and any(t is layer.base.weight for t in module.parameters(recurse=False)):
                raise UserError(f"the weight of {name} is shared with {other}, which would change with it; untie them")
    parents = list(model.modules())
    for layer in layers.values():
        layer.absorb(list(layer.active))
        _replace(parents, layer, layer.base)


def remove(model: nn.Module) -> None:
    """Makes plain layers again, as they were before `adapt`; the adapters and their changes go."""
    parents = list(model.modules())
    for layer in adapted_layers(model).values():
        _replace(parents, layer, layer.base)


def _replace(parents: Iterable[nn.Module], old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in every place where `old` stands, so that a layer used twice is adapted in both."""
    for parent in parents:
        # Not named_children(), which passes over a child's second name.
        for slot in [slot for slot, child in parent._modules.items() if child is old]:
            setattr(parent, slot, new)


def _refuse_weight_readers(parents: Iterable[nn.Module], chosen: dict[str, nn.Module]) -> None:
    for parent in parents:
        for name, layer in chosen.items():
            if isinstance(parent, READS_WEIGHTS) and any(part is layer for part in parent.modules()):
                raise UserError(
                    f"{name} is part of {_kind(parent)}, which reads its weight instead of calling it, and this "
                    "adapter's change is none of the weight; leave it out, or choose an adapter that can be merged"
                )


def _kind(module: nn.Module) -> str:
    return type(module).__name__
