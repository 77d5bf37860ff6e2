"""Ranks agree on a name for their start, over a store that still holds the names of earlier starts."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightspan.core.meeting import agreed_key


def test_each_start_has_a_name_of_its_own_that_all_of_its_ranks_know():
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        names = []
        for ranks in (4, 4, 2, 3):  # a rank is lost, and one comes back
            first = pool.submit(agreed_key, store, 0, ranks)
            others = [pool.submit(agreed_key, store, rank, ranks) for rank in range(ranks - 1, 0, -1)]
            (name,) = {first.result(), *(other.result() for other in others)}
            names.append(name)
    assert len(set(names)) == 4


def test_what_a_killed_rank_has_said_is_not_taken_for_its_successor():
    store = dist.HashStore()
    store.set("lightspan/here/1", "killed")
    with pytest.raises(RuntimeError, match=r"ranks \[1\] of 2 did not start"):
        agreed_key(store, 0, 2, timedelta(seconds=0.2))
