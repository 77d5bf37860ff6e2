import mmap

import pytest
import torch
from torch import nn

from lightspan.core.memory import parameter_counts, state_bytes
from lightspan.core.resident import peak_rss_bytes, rss_bytes


def stepped(optimizer_class: type[torch.optim.Optimizer], **options: float) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(7, dtype=torch.float64))]
    optimizer = optimizer_class(parameters, **options)
    assert state_bytes(optimizer) == 0
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 15 * 4 + 7 * 8),
        (torch.optim.AdamW, {"lr": 0.1}, 2 * (15 * 4 + 7 * 8) + 2 * 4),  # a float32 step count for each parameter
    ],
)
def test_known_optimisers_by_hand(optimizer, options, expected):
    assert state_bytes(stepped(optimizer, **options)) == expected


def test_a_storage_counts_once_and_whole_also_in_nested_state():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    shared = torch.zeros(100)
    optimizer.state["x"] = {"view": shared[:10], "other": [shared[50:], {"deep": torch.zeros(3)}], "count": 7}
    assert state_bytes(optimizer) == 400 + 12


def test_parameters_shared_by_two_modules_count_once():
    module = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    module[1].weight = module[0].weight
    module[1].bias.requires_grad_(False)
    assert parameter_counts(module) == (6 + 2 + 2, 6 + 2)


def test_the_resident_set_grows_with_memory_that_is_written():
    before = rss_bytes()
    block = mmap.mmap(-1, 64 * 2**20)  # from the kernel: an allocator may have that much lying about
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert rss_bytes() - before > 50 * 2**20
    assert peak_rss_bytes() >= rss_bytes() - 2**20
    del block
