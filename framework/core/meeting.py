"""How ranks agree on something new over a store that still holds what earlier starts of theirs have said."""

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_LOOK_S = 0.02


def agreed_key(store: dist.Store, rank: int, ranks: int, wait: timedelta = timedelta(minutes=30)) -> str:
    """A name for this start of the ranks, the same on all of them, that no earlier start has had.

    Each rank writes down a name of its own for this start and is answered by rank 0 under that name: an answer to an
    earlier start cannot be taken for one to this. Rank 0 answers until all have confirmed; the name of a rank of an
    earlier start, which it may find first, is answered in vain. All processes of earlier starts must have ended.

    Raises: RuntimeError for ranks that do not come within `wait`.
    """
    own = secrets.token_hex(8)
    if rank != 0:
        store.set(f"lightspan/here/{rank}", own)
        store.wait([f"lightspan/answer/{own}"], wait)
        key = str(store.get(f"lightspan/answer/{own}"), "ascii")
        store.set(f"lightspan/met/{key}/{rank}", own)
        return key
    waiting, until_s = set(range(1, ranks)), time.monotonic() + wait.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"lightspan/here/{other}"]):
                name = str(store.get(f"lightspan/here/{other}"), "ascii")
                store.set(f"lightspan/answer/{name}", own)
        waiting -= {other for other in waiting if store.check([f"lightspan/met/{own}/{other}"])}
        if time.monotonic() > until_s:
            raise RuntimeError(f"ranks {sorted(waiting)} of {ranks} did not start within {wait}")
        if waiting:
            time.sleep(_LOOK_S)
    return own
