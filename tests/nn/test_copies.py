"""Copies of networks: what is shared, and what of a network that cannot be copied is named."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from lightspan.core.errors import UserError
from lightspan.nn.copies import copied
from lightspan.nn.teachers.ema import EMATeacher


def holding(thing: Any) -> nn.Module:
    part = nn.ReLU()
    part.held = thing
    return part


def computed() -> nn.Module:
    """A part that keeps a tensor with a graph, as a hook that looks at activations does."""
    return holding(torch.ones(2, requires_grad=True) * 2)


UNCOPIED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: old_weight_norm(nn.Linear(3, 3)),
    "computed tensor": computed,
    "lock": lambda: holding(threading.Lock()),
    "generator": lambda: holding(row for row in range(3)),
}


def test_a_copy_is_equal_and_shares_no_weight() -> None:
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)).eval()
    copy, x = copied(network, "M"), torch.randn(2, 3)
    assert torch.equal(copy(x), network(x))
    assert not {id(parameter) for parameter in copy.parameters()} & {
        id(parameter) for parameter in network.parameters()
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", UNCOPIED)
def test_the_innermost_part_that_cannot_be_copied_is_named(kind: str) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), UNCOPIED[kind]()))
    with pytest.raises(
        UserError, match=r"EMATeacher needs a copy of Sequential, but 1\.1 \(torch\.nn.*cannot be copied"
    ):
        EMATeacher(network)


def test_of_a_network_without_a_part_the_network_is_named() -> None:
    with pytest.raises(UserError, match=r"M needs a copy of ReLU, but the network itself \(torch.*TypeError"):
        copied(holding(threading.Lock()), "M")


def test_a_network_that_has_no_weights_yet_is_refused() -> None:
    with pytest.raises(UserError, match=r"weight '1.weight' has no shape yet; show the network a batch first"):
        EMATeacher(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)))
