"""Where the state of an optimiser lives between its steps: with the parameters, or on the host.

State on the host is copied to the device for its part of the step, one stack of matrices or a few unprojected
parameters at a time, and copied back. Two slots of device memory take turns: while the step works on what is in one,
the other sends its state back and takes the next one in. The equations only ever see tensors on the device.

Frames stay on the device. Both halves of a step read them, and so does a backward pass that projects.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightspan.core.sharded import local, with_part
from lightspan.optim.matrices.shapes import is_dense
from lightspan.optim.matrices.stacks import State

HOST = torch.device("cpu")
LARGEST_TRANSFER = 1 << 26
"""Bytes of state that are copied to the device together, unless a single parameter has more: 64 MiB, about two
milliseconds of PCI Express, so launch cost is negligible."""
SMALLEST_OFFLOADED = 4096
"""Numbers of the smallest parameter whose state is worth copies: those of norms and biases stay."""
ALIGNMENT = 512
"""Bytes. In a slot, tensors begin at multiples of it, as in memory that torch's allocator gives out."""


@dataclass(frozen=True)
class StateTransfer:
    """A part of a step, on one device.

    Args:
        states: all state that it reads and writes, where it lives.
        offloaded: names of those of each of the `states` that live on the host.
        apply: takes that part of the step, given the `states` with everything on the device.
    """

    device: torch.device
    states: Sequence[State]
    offloaded: Sequence[Collection[str]]
    apply: Callable[[Sequence[State]], None]

    @property
    def hosted(self) -> list[Tensor]:
        """This rank's tensors on the host."""
        return [local(state[key]) for state, names in zip(self.states, self.offloaded, strict=True) for key in names]

    def size(self) -> int:
        """Bytes that they need in a slot."""
        return sum(_padded(tensor) for tensor in self.hosted)


class StatePlacement:
    """State lives with its parameters."""

    def is_offloaded(self, parameter: Tensor, key: str) -> bool:
        """Whether this part of a parameter's state lives on the host, and the parameter does not."""
        return False

    def create(self, make: Callable[[torch.device], State], parameter: Tensor) -> State:
        """The state that `make` makes on a device, where it will live."""
        return make(parameter.device)

    def place(self, state: State, parameter: Tensor) -> State:
        """A parameter's state, changed so that all of it is where it lives: others move it. Lightning moves all of it
        to the device when it has loaded a checkpoint.
        """
        return state

    def parts(self, parameters: Sequence[Tensor], states: Sequence[State]) -> Iterator[slice]:
        """The parameters that are stepped together."""
        yield slice(0, len(parameters))

    def largest_count(self, size: int) -> int | None:
        """How many matrices or stacks, each with `size` bytes of offloaded state, should be stepped together; None if
        any number may.
        """
        return None

    def sizes(self, state: Mapping[Tensor, State]) -> tuple[int, int]:
        """(bytes of an optimiser's state that live on the host if the parameters are on a device, bytes of memory on
        that device for their transfers), this rank's.
        """
        return 0, 0


@dataclass(frozen=True)
class HostState(StatePlacement):
    """State lives in the host's memory, pinned where the device can read that by itself. What has parameters on the
    host is treated as if nothing were offloaded.

    Args:
        stays: names of the state that lives with its parameters nevertheless.
    """

    stays: frozenset[str]

    def offloads(self, parameter: Tensor, key: str) -> bool:
        """`is_offloaded` of the parameter on any device."""
        return key not in self.stays and parameter.numel() >= SMALLEST_OFFLOADED

    def is_offloaded(self, parameter: Tensor, key: str) -> bool:
        return has_host(parameter.device) and self.offloads(parameter, key)

    def create(self, make: Callable[[torch.device], State], parameter: Tensor) -> State:
        return self.place(make(HOST), parameter)

    def place(self, state: State, parameter: Tensor) -> State:
        pins = _pins(parameter.device)
        for key, value in state.items():
            offloaded = self.is_offloaded(parameter, key)
            state[key] = _at(value, HOST if offloaded else parameter.device, offloaded and pins)
        return state

    def parts(self, parameters: Sequence[Tensor], states: Sequence[State]) -> Iterator[slice]:
        start = total = 0
        for i, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            size = sum(_padded(local(value)) for key, value in state.items() if self.is_offloaded(parameter, key))
            if i > start and (total + size > LARGEST_TRANSFER or parameter.device != parameters[start].device):
                yield slice(start, i)
                start, total = i, 0
            total += size
        yield slice(start, len(parameters))

    def largest_count(self, size: int) -> int | None:
        return max(LARGEST_TRANSFER // size, 1) if size else None

    def sizes(self, state: Mapping[Tensor, State]) -> tuple[int, int]:
        each = [
            sum(local(value).nbytes for key, value in held.items() if self.offloads(parameter, key))
            for parameter, held in state.items()
        ]
        # Of the larger transfers, of one parameter each, two may follow one another.
        largest = sorted([LARGEST_TRANSFER, LARGEST_TRANSFER, *each])[-2:]
        return sum(each), min(sum(each), sum(largest))


def run_offloaded(transfers: Sequence[StateTransfer]) -> None:
    """Takes the parts of a step, one after the other, with their state brought to the device and back."""
    for (device, copies), group in groupby(transfers, lambda transfer: (transfer.device, any(transfer.offloaded))):
        if copies:
            _run_offloaded(device, list(group))
        else:
            for transfer in group:
                transfer.apply(transfer.states)


def has_host(device: torch.device) -> bool:
    """Whether the host's memory is another one than that of the device."""
    return device.type != HOST.type


def streams_of(device: torch.device) -> Any:
    """torch's module with the streams of a device. Where there are none, as on the meta device, that of the CPU, whose
    streams do nothing: there all work is done in the order of the calls.
    """
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return torch.cpu
    return module if hasattr(module, "Stream") else torch.cpu


@torch.compiler.disable  # streams are not for a graph, and what they wait for must not move
def _run_offloaded(device: torch.device, transfers: Sequence[StateTransfer]) -> None:
    """Takes the parts of a step whose state travels. Three streams work at the same time: `here`, the stream of the
    step; `arrivals`, which copies state to the device; and `departures`, which copies it back.

    All orders that matter are those of events, not of time:

    - Slots are memory of the stream `here`, where work that used it before may still be under way, so `arrivals` begins
      after everything that `here` had been given by then.
    - The step reads a slot after the arrival there; the departure reads it after the step.
    - The next arrival in a slot comes after the departure from it. So two transfers are on the device, never three,
      also when the host is far ahead: slots are made once, and nothing is freed before the end.
    - At the end the host waits. From then on what reads the state, a checkpoint for one, sees what the step wrote
      without knowing of streams; and the slots, which are freed then, are used by nobody, so that the allocator need
      not be told of the other streams (`record_stream`). It also waits if a part raises.
    """
    streams = streams_of(device)
    # Without streams nobody would wait for a copy that returns early.
    early = streams is not torch.cpu
    here, arrivals, departures = streams.current_stream(device), streams.Stream(device), streams.Stream(device)

    def mark(stream: Any) -> Any:
        event = streams.Event()
        event.record(stream)
        return event

    sizes = [transfer.size() for transfer in transfers]
    slots = [torch.empty(max(sizes[i::2], default=0), dtype=torch.uint8, device=device) for i in range(2)]
    copies = [_device_copies(transfer.hosted, slots[i % 2]) for i, transfer in enumerate(transfers)]
    arrived: list[Any] = []
    departed: list[Any] = []

    def arrive(number: int) -> None:
        if number >= len(slots):
            arrivals.wait_event(departed[number - len(slots)])
        with streams.stream(arrivals):
            for copy, host in zip(copies[number], transfers[number].hosted, strict=True):
                copy.copy_(host, non_blocking=early)
        arrived.append(mark(arrivals))

    def depart(number: int) -> None:
        departures.wait_event(mark(here))
        with streams.stream(departures):
            for copy, host in zip(copies[number], transfers[number].hosted, strict=True):
                host.copy_(copy, non_blocking=early)
        departed.append(mark(departures))

    arrivals.wait_event(mark(here))
    try:
        arrive(0)
        for number, transfer in enumerate(transfers):
            if number + 1 < len(transfers):
                arrive(number + 1)
            here.wait_event(arrived[number])
            transfer.apply(_as_states(transfer, copies[number]))
            depart(number)
    finally:
        for stream in (arrivals, departures):
            mark(stream).synchronize()


def _device_copies(hosted: Sequence[Tensor], slot: Tensor) -> list[Tensor]:
    """Tensors in the memory of a slot, laid out as those on the host if these have no gaps."""
    copies, start = [], 0
    for host in hosted:
        memory = slot[start : start + host.nbytes].view(host.dtype)
        copies.append(memory.as_strided(host.shape, host.stride()) if is_dense(host) else memory.view(host.shape))
        start += _padded(host)
    return copies


def _as_states(transfer: StateTransfer, copies: Sequence[Tensor]) -> list[State]:
    """The states of a transfer, with its copies in place of what is offloaded."""
    left = iter(copies)
    return [
        {**state, **{key: next(left) for key in names}}
        for state, names in zip(transfer.states, transfer.offloaded, strict=True)
    ]


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _pins(device: torch.device) -> bool:
    """Whether the host's memory should be pinned, without which the device copies nothing while it computes."""
    return torch.accelerator.is_available() and streams_of(device) is not torch.cpu


def _at(value: Tensor, device: torch.device, pinned: bool) -> Tensor:
    """The tensor on a device, in pinned memory if it should be, itself if it is; of a sharded one this rank's part."""
    part = local(value)
    if part.device == device and (not pinned or part.is_pinned()):
        return value
    return with_part(value, torch.empty_like(part, device=device, pin_memory=pinned).copy_(part))
