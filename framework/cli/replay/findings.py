"""Where numbers stop being finite in a forward and a backward pass: the first module, operation or parameter."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.hooks import RemovableHandle

from lightspan.core.sharded import local_numbers, square_norms

_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')
_LIBRARIES = re.compile(
    r"/site-packages/(torch|lightning|lightning_fabric|pytorch_lightning)/|/lib/python3[^/]*/[^/]+$"
)
MOST_LINES = 4
"""Lines of code that a finding names, the last ones first."""


@dataclass(frozen=True)
class NotFinite:
    """Something that is not finite.

    Attributes:
        what: the subject of a sentence that ends in "is not finite".
        details: lines on the numbers that it came from.
    """

    what: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """A module that has been called and has not returned yet.

    Attributes:
        sources: the operations that its inputs came from.
        broken: those of its inputs that are not finite, and have not proved harmless.
        gap: what is said if these are why its output is not finite.
    """

    name: str
    sources: set[Node]
    broken: list[Tensor]
    gap: NotFinite | None


class Findings:
    """What is not finite in one step, in the order in which it happened.

    Use it as a context around the step. A module is looked at when it is called and when it returns, so that the
    innermost one comes first. Finite inputs and a broken output: it is named. A broken output of broken inputs follows
    from what came before, or, if nothing was found there, from what was computed between modules: that gap is named.
    Broken inputs of a module whose output is finite are harmless: a mask of minus infinity is none of our business.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: list[NotFinite] = []
        self._handles: list[RemovableHandle] = []
        self._module_of: dict[Node, str] = {}
        self._calls: list[_Call] = []
        self._harmless: dict[int, Tensor] = {}  # by storage; kept, so that no other tensor gets the same one
        self._last = "what the step starts from"

    def __enter__(self) -> "Findings":
        for name, part in self.module.named_modules():
            if not name:  # strategies call the whole module for its training_step, whose output is the loss
                continue
            before, after = partial(self._before_forward, name), partial(self._after_forward, name)
            self._handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(part.register_forward_hook(after, with_kwargs=True))
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
        self._last = "the batch"
        for name, tensor in tensors_in(batch):
            if broken(tensor):
                self.found.append(NotFinite(f"the batch{name}", [described(f"batch{name}", tensor)]))

    def look_at_loss(self, loss: Tensor) -> None:
        """The loss, before its backward pass, whose operations are looked at from now on if all has been well."""
        if broken(loss) and not self.found:
            what = "the loss, though the outputs of all modules are finite,"
            self.found.append(NotFinite(what, self._between([loss])))
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
                elif not square_norms([local_numbers(parameter.grad)]).isfinite().all():
                    line = described("gradient", parameter.grad)
                    self.found.append(NotFinite(f"the square of the gradient of {name}", [line]))

    def _before_forward(self, name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = list(tensors_in((args, kwargs)))
        wrong = [tensor for _, tensor in inputs if broken(tensor) and _storage(tensor) not in self._harmless]
        what = f"the input of {name} ({type(part).__name__})"
        gap = NotFinite(what, self._between(wrong) + _lines("input", inputs)) if wrong else None
        sources = {tensor.grad_fn for _, tensor in inputs if tensor.grad_fn is not None}
        self._calls.append(_Call(name, sources, wrong, gap))
        if not wrong:
            self._last = f"the input of {name}"

    def _after_forward(self, name: str, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while (call := self._calls.pop()).name != name:
            pass  # an exception left it
        outputs = list(tensors_in(output))
        for _, tensor in outputs:
            for node in _graph(tensor.grad_fn, call.sources | self._module_of.keys()):
                self._module_of[node] = name
        if not any(broken(tensor) for _, tensor in outputs):
            if any(tensor.is_floating_point() for _, tensor in outputs):  # one that counts says nothing of its inputs
                self._harmless |= {_storage(tensor): tensor for tensor in call.broken}
            self._last = f"the output of {name}"
        elif not self._unexplained(call):
            lines = _lines("input", tensors_in((args, kwargs)))
            lines += _lines("parameter", part.named_parameters(recurse=False)) + _lines("output", outputs)
            self.found.append(NotFinite(f"the output of {name} ({type(part).__name__})", lines))
        elif not self.found:
            self.found.append(next(gap for one in (*self._calls, call) if (gap := self._unexplained(one))))

    def _unexplained(self, call: _Call) -> NotFinite | None:
        """The gap before a call, unless all its broken inputs have proved harmless in the meantime."""
        return call.gap if any(_storage(tensor) not in self._harmless for tensor in call.broken) else None

    def _between(self, tensors: Iterable[Tensor]) -> list[str]:
        """Where broken numbers may come from that no module returned: what was finite last, and the lines since."""
        parent = self._calls[-1] if self._calls else _Call("", set(), [], None)
        known = self._module_of.keys() | parent.sources
        nodes = [node for tensor in tensors for node in _graph(tensor.grad_fn, known)]
        ends = [following for node in nodes for following, _ in node.next_functions]
        ends += [tensor.grad_fn for tensor in tensors]
        names = {
            f"the input of {parent.name}" if node in parent.sources else f"the output of {self._module_of[node]}"
            for node in ends
            if node in known
        }
        before = sorted(names) or [self._last]
        said = f"{' and '.join(before)} {'was' if len(before) == 1 else 'were'} finite: look between them"
        lines = dict.fromkeys(line for node in nodes for line in _origin(node))
        return [said, *(f"computed at {line}" for line in [*lines][:MOST_LINES])]

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


def tensors_in(value: Any, place: str = "", around: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) of all tensors in a nested value: what pytrees know, dataclasses, and mappings of any class."""
    for path, leaf in tree_flatten_with_path(value)[0]:
        at = place + "".join(map(str, path))
        if isinstance(leaf, Tensor):
            yield at, leaf
        elif id(leaf) in around:  # it contains itself
            continue
        elif is_dataclass(leaf):
            for one in fields(leaf):
                yield from tensors_in(getattr(leaf, one.name, None), f"{at}.{one.name}", (*around, id(leaf)))
        elif isinstance(leaf, Mapping):
            for key, part in leaf.items():
                yield from tensors_in(part, f"{at}[{key!r}]", (*around, id(leaf)))


def broken(tensor: Tensor) -> bool:
    """Whether this rank's numbers of a tensor contain NaN or an infinity."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not bool(local_numbers(tensor).isfinite().all())


def described(name: str, tensor: Tensor) -> str:
    """Shape, type, range of the finite numbers, and how many are not finite, in one line. Of complex numbers, real and
    imaginary parts count by themselves.
    """
    start = f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    numbers = local_numbers(tensor.detach())
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


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor looks at: the same for its views."""
    return local_numbers(tensor).untyped_storage().data_ptr()


def _lines(kind: str, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [described(f"{kind} {where}".rstrip(), tensor) for where, tensor in tensors]


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
