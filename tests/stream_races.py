"""Streams of a device that is not there, and which accesses to memory no event orders: a race needs no GPU to be seen.

Work is done at once, on the CPU; what is recorded is who does it. Each stream, and the host, has a clock of what it
knows to be done: of itself, of what the host knew when it gave the work, and of what it has waited for. Two accesses to
one storage, one of which writes, race if the later one's stream does not know of the earlier one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
VIEWS = {aten.view.dtype, aten.as_strided.default, aten.slice.Tensor, aten.detach.default}


@dataclass
class Streams:
    """Stands for a module such as torch.cuda.

    Args:
        left_out: the number of the wait that is not made, of those that `waits` counts.
        races: what was found.
        slots: memory that was made of bytes.
    """

    left_out: int | None = None
    waits: int = 0
    races: list[str] = field(default_factory=list)
    accesses: dict[int, list[tuple[str, int, bool]]] = field(default_factory=lambda: defaultdict(list))
    kept: list[Any] = field(default_factory=list)
    host: Counter[str] = field(default_factory=Counter)
    made: int = 0
    slots: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.main = self.current = _Stream(self, "main")

    def Stream(self, device: torch.device) -> "_Stream":
        self.made += 1
        return _Stream(self, f"side {self.made}")

    def Event(self) -> "_Event":
        return _Event(self)

    def current_stream(self, device: torch.device) -> "_Stream":
        return self.current

    @contextmanager
    def stream(self, stream: "_Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def access(self, name: str, tensor: Tensor, writes: bool) -> None:
        """By the work that the current stream is given."""
        storage, stream = tensor.untyped_storage(), self.current
        self.kept.append(storage)  # so that no other gets its address
        known = self.accesses[storage._cdata]
        for who, when, wrote in known:
            if who != stream.name and (writes or wrote) and stream.clock[who] < when:
                self.races.append(f"{name} on {stream.name} and earlier work on {who}")
        known.append((stream.name, stream.clock[stream.name], writes))

    def host_knows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all that streams were to do with these tensors is done, as the host knows."""
        every = (access for tensor in tensors for access in self.accesses[tensor.untyped_storage()._cdata])
        return all(self.host[who] >= when for who, when, _ in every)

    def counts(self) -> bool:
        """Whether the wait that is due is made."""
        self.waits += 1
        return self.left_out != self.waits - 1


@dataclass
class _Stream:
    owner: Streams
    name: str
    clock: Counter[str] = field(default_factory=Counter)

    def wait_event(self, event: "_Event") -> None:
        if self.owner.counts():
            self.clock |= event.clock


@dataclass
class _Event:
    owner: Streams
    clock: Counter[str] = field(default_factory=Counter)

    def record(self, stream: _Stream) -> None:
        self.clock = stream.clock.copy()

    def synchronize(self) -> None:
        self.owner.host |= self.clock


class Watch(TorchDispatchMode):
    """Tells `Streams` what each operation reads and writes. A new tensor counts as written on the stream that made it:
    its memory may have served that stream before.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in VIEWS:
            return out
        stream = self.streams.current
        stream.clock |= self.streams.host
        stream.clock[stream.name] += 1
        schema, given = func._schema.arguments, [*args, *(kwargs or {}).values()]
        writes = [a.alias_info is not None and a.alias_info.is_write for a in schema]
        seen = set()
        for value, written in zip(given, [*writes, *[False] * len(given)], strict=False):
            for tensor in _tensors(value):
                seen.add(tensor.untyped_storage()._cdata)
                self.streams.access(func.name(), tensor, written)
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in seen:
                if func is aten.empty.memory_format and tensor.dtype == torch.uint8:
                    self.streams.slots.append(tensor)
                self.streams.access(func.name(), tensor, True)
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]
