"""Where numbers stop being finite in a forward and a backward pass: the first module, operation or parameter."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.hooks import RemovableHandle

from lightspan.sharded import held_numbers, square_norms

_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')
_LIBRARIES = re.compile(
    r"/site-packages/(torch|lightning|lightning_fabric|pytorch_lightning)/|/lib/python3[^/]*/[^/]+$"
)


@dataclass(frozen=True)
class NotFinite:
    """Something that is not finite.

    Attributes:
        what: the subject of a sentence that ends in "is not finite".
        details: lines on the numbers that it came from.
    """

    what: str
    details: list[str] = field(default_factory=list)


class Findings:
    """What is not finite in one step, in the order in which it happened.

    Use it as a context around the step. Modules are looked at when they return, so that the innermost comes first;
    those whose inputs are not finite either are left out, since something before them was found.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: list[NotFinite] = []
        self._handles: list[RemovableHandle] = []
        self._module_of: dict[Node, str] = {}

    def __enter__(self) -> "Findings":
        for name, part in self.module.named_modules():
            if not name:  # strategies call the whole module for its training_step, whose output is the loss
                continue
            hook = partial(self._after_forward, name)
            self._handles.append(part.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def look_at_weights(self) -> None:
        """Parameters and buffers before the step."""
        named: list[tuple[str, str, Tensor]] = [("parameter", *item) for item in self.module.named_parameters()]
        named += [("buffer", *item) for item in self.module.named_buffers()]
        for kind, name, tensor in named:
            if broken(tensor):
                self.found.append(NotFinite(f"{kind} {name}, before the step,", [described(name, tensor)]))

    def look_at_batch(self, batch: Any) -> None:
        """What the loader gave."""
        for name, tensor in tensors_in(batch):
            if broken(tensor):
                self.found.append(NotFinite(f"the batch{name}", [described(f"batch{name}", tensor)]))

    def look_at_loss(self, loss: Tensor) -> None:
        """The loss, before its backward pass, whose operations are looked at from now on if all has been well."""
        if broken(loss) and not self.found:
            what = "the loss, though the outputs of all modules are finite,"
            self.found.append(NotFinite(what, ["look at what training_step does after its last module"]))
        for node in _graph(loss.grad_fn, set()) if not self.found else ():
            node.register_hook(partial(self._after_backward, node))

    def look_at_gradients(self) -> None:
        """The gradients that the optimiser would get."""
        if self.found:
            return
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                if broken(parameter.grad):
                    self.found.append(NotFinite(f"the gradient of {name}", [described(name, parameter)]))
                elif not square_norms([held_numbers(parameter.grad)]).isfinite().all():
                    line = described("gradient", parameter.grad)
                    self.found.append(NotFinite(f"the square of the gradient of {name}", [line]))

    def _after_forward(self, name: str, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in(output))
        stops = {tensor.grad_fn for _, tensor in inputs}
        for _, tensor in outputs:
            for node in _graph(tensor.grad_fn, stops | self._module_of.keys()):
                self._module_of[node] = name
        if not any(broken(tensor) for _, tensor in outputs) or any(broken(tensor) for _, tensor in inputs):
            return
        lines = [described(f"input {where}".rstrip(), tensor) for where, tensor in inputs]
        lines += [described(f"parameter {where}", tensor) for where, tensor in part.named_parameters(recurse=False)]
        lines += [described(f"output {where}".rstrip(), tensor) for where, tensor in outputs]
        self.found.append(NotFinite(f"the output of {name} ({type(part).__name__})", lines))

    def _after_backward(
        self, node: Node, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
    ) -> None:
        if not _any_broken(inputs) or _any_broken(outputs):
            return
        place = f"of {self._module_of[node]}" if self._module_of.get(node) else "of training_step"
        lines = [described("gradient that came in", tensor) for tensor in outputs if tensor is not None]
        lines += [described("gradient that came out", tensor) for tensor in inputs if tensor is not None]
        lines += [f"computed at {line}" for line in _origin(node)]
        self.found.append(NotFinite(f"the gradient behind {node.name()} {place}", lines))


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) of all tensors in a nested value."""
    for path, leaf in tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            yield "".join(map(str, path)), leaf


def broken(tensor: Tensor) -> bool:
    """Whether this rank's numbers of a tensor contain NaN or an infinity."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not bool(held_numbers(tensor).isfinite().all())


def described(name: str, tensor: Tensor) -> str:
    """Shape, type, range of the finite numbers, and how many are not finite, in one line. Of complex numbers, real and
    imaginary parts count by themselves.
    """
    start = f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    numbers = held_numbers(tensor.detach())
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers.resolve_conj())
    if not numbers.numel():
        return f"{start}, empty"
    if not numbers.is_floating_point():
        return f"{start} from {int(numbers.min())} to {int(numbers.max())}"
    finite = numbers[numbers.isfinite()].double()
    span = f" from {finite.min().item():.4g} to {finite.max().item():.4g}" if finite.numel() else ""
    nan, inf = int(numbers.isnan().sum()), int(numbers.isinf().sum())
    wrong = " and ".join(f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "infinite")) if count)
    return f"{start}{span}" + (f", {wrong} of {numbers.numel()}" if wrong else "")


def _any_broken(tensors: Iterable[Tensor | None]) -> bool:
    return any(broken(tensor) for tensor in tensors if tensor is not None)


def _graph(start: Node | None, stops: Any) -> list[Node]:
    """The nodes from `start` backwards that are not behind one of `stops`."""
    found: dict[Node, None] = {}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node not in stops:
            found[node] = None
            waiting += [following for following, _ in node.next_functions]
    return list(found)


def _origin(node: Node) -> list[str]:
    """The line outside torch that computed a node, if anomaly detection recorded it."""
    frames = [_FRAME.search(frame) for frame in node.metadata.get("traceback_", ())]  # type: ignore[attr-defined]  # a property
    own = [frame for frame in frames if frame is not None and not _LIBRARIES.search(frame["file"])]
    return [f"{own[-1]['file']}:{own[-1]['line']}, {own[-1]['code'].strip()}"] if own else []
