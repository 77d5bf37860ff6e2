"""Ranks that work on one thing in step: none is left waiting for one that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightspan.distributed import agreed, all_reduce_max, rank, world_size
from lightspan.errors import UserError


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Ends on all ranks or raises on all; they meet at its end. Raises: UserError where only another rank failed."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    failed = bool(all_reduce_max(torch.tensor(int(error is not None), device=_device())))
    if error is not None:
        raise error
    if failed:
        raise UserError(f"another rank could not {doing}; see what it says")


def first_rank_says(question: Callable[[], bool]) -> bool:
    """The first rank's answer, on every rank; only that one is asked."""
    return bool(agreed(torch.tensor(int(rank() == 0 and question()), device=_device())))


def digest_of_first_rank(digest: str) -> str:
    """The first rank's digest, hexadecimal and of one length everywhere, on every rank."""
    return bytes(agreed(torch.tensor(list(bytes.fromhex(digest)), device=_device())).tolist()).hex()


def _device() -> torch.device:
    """Where the process group's collectives run."""
    on_gpu = world_size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
