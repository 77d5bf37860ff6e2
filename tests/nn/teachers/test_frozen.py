import torch
from torch import nn

from lightspan.nn.teachers.frozen import Frozen


def test_a_frozen_network_stays_in_evaluation_mode_and_without_gradients() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    around = nn.ModuleList([Frozen(network), nn.Linear(3, 3)]).train()
    assert around[1].training
    assert not any(module.training for module in around[0].modules())
    before = network[1].running_mean.clone()
    x = torch.randn(5, 3, requires_grad=True)
    out = around[0](x)
    assert torch.equal(out, network(x))
    assert torch.equal(network[1].running_mean, before)
    assert not out.requires_grad
    assert not any(parameter.requires_grad for parameter in around[0].parameters())
