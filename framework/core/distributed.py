"""Lets a loss see the batch of all ranks, with gradients that DDP's averaging makes exact.

Convention: every rank computes the same GLOBAL loss L from sums over all ranks. The backward pass of `all_reduce_sum`
sums the gradients of all ranks, so a rank's parameter gradient is world_size * dL/d(theta through its own samples), and
the mean over ranks that DDP and FSDP take is dL/d(theta): what one rank with the whole batch gets. A loss written this
way is therefore neither multiplied nor divided by the number of ranks.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightspan.core.errors import UserError

BUCKET_BYTES = 25 * 2**20
"""Largest size in bytes of a collective over many tensors: DDP's size, large enough for full bandwidth."""
_REPLICATED = "_replicated_buffers"


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def register_replicated(module: nn.Module, name: str, tensor: Tensor, persistent: bool = True) -> None:
    """`module.register_buffer` for what all ranks compute alike: constants, and what comes from the rows of all ranks.

    The strategy DDP sends it from rank 0 once, when training starts. Any other buffer travels before each forward pass,
    as torch has it: the running statistics of a BatchNorm differ between ranks, and rank 0's are those that count.
    Copies of the module, such as a teacher, keep the mark.
    """
    module.register_buffer(name, tensor, persistent)
    module.__dict__.setdefault(_REPLICATED, set()).add(name)


def replicated_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers in a module and its parts that were registered as equal on all ranks."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in part.__dict__.get(_REPLICATED, ())
    }


def end_process_group() -> None:
    """Ends the default process group, all ranks in step; does nothing without one. For the end of a process's work.

    A gloo group that is still there when the interpreter exits, or that one rank ends while another still uses it,
    can abort the process after all its work is done, which a launcher would see as a failure.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a DDP reducer that is no longer used still holds the group
        dist.barrier()
        dist.destroy_process_group()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        # d(sum of all ranks' losses)/dx: torch's own dist.all_reduce would silently drop this term.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, differentiable in every rank's `x`; `x` itself on one rank.

    Every rank must call it, in the same order and with the same shape, and must run backward if any rank does.
    """
    return _AllReduceSum.apply(x) if world_size() > 1 else x


def all_reduce_sums(*parts: Tensor) -> tuple[Tensor, ...]:
    """`all_reduce_sum` of several tensors of one dtype, of any shapes, in one collective."""
    if world_size() == 1:
        return parts
    flat = all_reduce_sum(torch.cat([part.flatten() for part in parts]))
    split = flat.split([part.numel() for part in parts])
    return tuple(total.view(part.shape) for total, part in zip(split, parts, strict=True))


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """(rows of all ranks in their order, place of this rank's first one), differentiable in every rank's rows.

    Ranks may have different numbers of rows, or none; this asks the device for them. Every rank must call it.
    """
    if world_size() == 1:
        return x, 0
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    dist.all_reduce(counts)
    before, after = int(counts[: rank()].sum()), int(counts[rank() + 1 :].sum())
    padded = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (before, after))
    return all_reduce_sum(padded), before


@torch.no_grad()
def all_reduce_max(x: Tensor) -> Tensor:
    """The largest value of each entry over all ranks, without a gradient; `x` itself, detached, on one rank."""
    x = x.detach()
    if world_size() > 1:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def mean_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their means over all ranks, in place and bit-equal on all of them.

    They travel in a few large collectives, each sent while the next is packed. Every rank must pass the same shapes
    and dtypes in the same order.
    """
    # Divided before the sum, as DDP does: half-precision sums of many ranks could overflow.
    _in_buckets(tensors, lambda flat: dist.all_reduce(flat.div_(world_size()), async_op=True))


def broadcast_first_rank(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by those of rank 0, in place; shapes, dtypes and order must be equal on all ranks."""
    _in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0, async_op=True))


def agreed(tensor: Tensor) -> Tensor:
    """Rank 0's `tensor` on every rank, in place: for a number from which all ranks must make the same choice.

    Replicas compute it from the same gradient, but another processor, number of threads or library may round the last
    bit differently, and so choose differently.
    """
    if world_size() > 1:
        broadcast_first_rank([tensor])
    return tensor


@contextlib.contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """Succeeds on all ranks or raises on all; they meet at its end. Raises: UserError if only another rank failed."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    failed = bool(all_reduce_max(torch.tensor(int(error is not None), device=_device())))
    if error is not None:
        raise error
    if failed:
        raise UserError(f"another rank could not {doing}; see its message")


def from_first_rank(question: Callable[[], bool]) -> bool:
    """The first rank's answer, on every rank; only the first rank computes it."""
    return bool(agreed(torch.tensor(int(rank() == 0 and question()), device=_device())))


def digest_of_first_rank(digest: str) -> str:
    """The first rank's digest, hexadecimal and of the same length everywhere, on every rank."""
    return bytes(agreed(torch.tensor(list(bytes.fromhex(digest)), device=_device())).tolist()).hex()


def _in_buckets(tensors: Sequence[Tensor], start: Callable[[Tensor], dist.Work]) -> None:
    under_way: tuple[list[Tensor], Tensor, dist.Work] | None = None
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
        started = bucket, flat, start(flat)
        if under_way is not None:
            _unpack(*under_way)
        under_way = started
    if under_way is not None:
        _unpack(*under_way)


def _unpack(bucket: list[Tensor], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Buckets of tensors of one dtype and device, up to `BUCKET_BYTES` or one tensor, in an order that depends on
    only shapes, dtypes and the given order.
    """
    open_ones: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_ones.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(held.nbytes for held in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = open_ones[tensor.dtype, tensor.device] = []
        bucket.append(tensor)
    yield from open_ones.values()


def _device() -> torch.device:
    """Where the process group's collectives run."""
    on_gpu = world_size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
