import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.nn.taps import blocks_of, tapped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 2))])
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def test_one_pass_gives_every_blocks_output_in_order_and_leaves_no_hook() -> None:
    net, x = Net(), torch.randn(4, 3)
    blocks = blocks_of(net, ["stages"])
    assert blocks == list(net.stages)
    with tapped(blocks) as outputs:
        y = net(x)
    assert [tuple(output.shape) for output in outputs] == [(4, 3), (4, 2)]
    assert torch.equal(net.head(outputs[1]), y)
    outputs[0].sum().backward()
    assert net.stages[0][0].weight.grad is not None
    net(x)
    assert len(outputs) == 2


def test_several_containers_follow_each_other() -> None:
    net = Net()
    assert blocks_of(net, ["stages.1", "stages.0"]) == [*net.stages[1], *net.stages[0]]


def test_hooks_go_also_when_the_pass_fails() -> None:
    net = Net()
    with pytest.raises(RuntimeError), tapped(blocks_of(net, ["stages"])):
        net(torch.randn(4, 5))
    assert not any(module._forward_hooks for module in net.modules())


def test_an_unknown_container_is_named_beside_those_there_are() -> None:
    with pytest.raises(UserError, match=r"Net has no container 'blocks'; it has stages, stages\.0, stages\.1"):
        blocks_of(Net(), ["blocks"])
