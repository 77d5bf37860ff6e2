"""What a step costs, counted: copies between host and device, kernels, bytes of temporaries, bytes of state copied.

No GPU is needed. Tensors on the meta device stand for those on one: they have shapes and no values. What the host reads
is counted and answered with zeros, and copies to the device are counted wherever they hide: in operations on tensors of
two devices, and in `torch.tensor`, `new_tensor` and lists as indices, which make tensors on a device below the level at
which operations are seen. On the CPU, own operators count as what their CPU paths do.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default}
NO_KERNEL = {aten.lift_fresh.default, aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
NO_KERNEL |= {aten.new_empty.default, aten.new_empty_strided.default}
COPIES = {aten.clone.default, aten._to_copy.default, aten.index.Tensor, aten.index_select.default, aten.gather.default}
MAKES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}
INDEXES = {Tensor.__getitem__, Tensor.__setitem__}


@dataclass
class StepCosts:
    """Counts.

    Args:
        to_device, from_device: copies from the host and to it.
        bytes_to_device, bytes_from_device: of copies of whole tensors between tensors of both.
        kernels: calls that compute or write something, by name; a call on a list of tensors is one.
        copied_state: bytes that copies of state, and gathers from it, have written elsewhere.
        peak: most bytes that tensors made meanwhile took up together.
    """

    to_device: int = 0
    from_device: int = 0
    bytes_to_device: int = 0
    bytes_from_device: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    copied_state: int = 0
    peak: int = 0


@contextmanager
def step_costs(state: Iterable[Tensor] = ()) -> Iterator[StepCosts]:
    """Counts what is done inside.

    Args:
        state: the tensors of which copies are counted.
    """
    costs = StepCosts()
    with _Calls(costs), _Operations(costs, state):
        yield costs


class _Calls(TorchFunctionMode):
    """Copies to the device that no operation shows."""

    def __init__(self, costs: StepCosts) -> None:
        super().__init__()
        self.costs = costs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        hidden = (func in MAKES and out.is_meta) or (func in INDEXES and args[0].is_meta and _has_list(args[1]))
        self.costs.to_device += hidden
        return out


def kept_in(graphs: list[GraphModule]) -> Callable[[GraphModule, list[Tensor]], Callable[..., Any]]:
    """A backend of torch.compile that adds each graph to a list and runs it as it is: it needs no C++ compiler."""

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return backend


def _has_list(index: Any) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


class _Operations(TorchDispatchMode):
    def __init__(self, costs: StepCosts, state: Iterable[Tensor]) -> None:
        super().__init__()
        self.costs, self.made = costs, dict[StorageWeakRef, int]()
        self.state = {_storage(tensor) for tensor in state}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if given and given[0].is_meta and (func in READS or kwargs.get("device") == torch.device("cpu")):
            self.costs.from_device += 1
            return 0 if func in READS else torch.zeros(given[0].shape, dtype=given[0].dtype)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.costs.from_device += 1
            self.costs.bytes_from_device += args[0].nbytes
            return args[0]
        if func.namespace == "lightspan" and not any(tensor.is_meta for tensor in given):
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        # torch's fused steps only write, for which the meta device has no kernel.
        out = None if "_fused_" in func.name() and given[0].is_meta else func(*args, **kwargs)
        self._count(func, given, _tensors(out))
        return out

    def _count(self, func: Any, given: list[Tensor], out: list[Tensor]) -> None:
        writes = any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments)
        known = {_storage(tensor) for tensor in given}
        new = [tensor for tensor in out if _storage(tensor) not in known]
        if (new or writes) and func not in NO_KERNEL:
            self.costs.kernels[func.name()] += 1
        # Numbers of no axes are arguments of kernels.
        on_host = any(tensor.ndim for tensor in given if not tensor.is_meta)
        self.costs.to_device += on_host and any(tensor.is_meta for tensor in (*given, *out))
        if func is aten.copy_.default and on_host:
            self.costs.bytes_to_device += given[1].nbytes
        if func in COPIES and _storage(given[0]) in self.state:
            self.costs.copied_state += sum(tensor.nbytes for tensor in new)
        if new:
            self.made.update((StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()) for t in new)
            self.made = {storage: size for storage, size in self.made.items() if not storage.expired()}
            self.costs.peak = max(self.costs.peak, sum(self.made.values()))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
