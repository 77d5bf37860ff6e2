import pytest
import torch

from lightspan.backbones.pct_net import PCTNet
from lightspan.core.errors import UserError

SMALL = {"widths": (4, 4, 8, 8, 16), "heads": (1, 2, 4), "window": 2}


def test_maps_have_the_sizes_and_widths_of_their_levels() -> None:
    torch.manual_seed(0)
    for flat, depths in ((0, (16, 8, 4, 2)), (1, (16, 16, 8, 4)), (2, (16, 16, 16, 8))):
        network = PCTNet(flat=flat, **SMALL).eval()
        maps = network.scales(torch.rand(1, 1, 16, 16, 32))
        assert [each.shape[1] for each in maps] == network.widths == [4, 4, 8, 8]
        assert [each.shape[2:] for each in maps] == [(d, 16 >> k, 32 >> k) for k, d in enumerate(depths)]
        assert torch.equal(network(torch.ones(1, 1, 16, 16, 32)), network.scales(torch.ones(1, 1, 16, 16, 32))[0])


def test_every_weight_learns_and_dropout_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    network, x = PCTNet(drop_path=0.0, **SMALL), torch.rand(2, 1, 32, 16, 16)
    sum(each.square().mean() for each in network.scales(x)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_a_level_adds_convolutions_and_attention() -> None:
    torch.manual_seed(0)
    block, x = PCTNet(**SMALL).eval().down[2], torch.rand(1, 8, 4, 4, 4)
    attended = block.trans(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[operator]
    assert torch.equal(block(x), block.conv(x) + attended)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("widths", {"widths": (4, 4)}),
        ("heads", {"heads": (3, 3, 3)}),
        ("flat", {"flat": 3}),
        ("dropout", {"dropout": 1}),
    ],
)
def test_settings_that_do_not_fit_are_named(name, wrong) -> None:
    with pytest.raises(UserError, match=name):
        PCTNet(**{**SMALL, **wrong})


def test_sides_that_do_not_halve_are_refused() -> None:
    with pytest.raises(UserError, match=r"multiples of \[16, 16, 16\]"):
        PCTNet(**SMALL)(torch.rand(1, 1, 16, 16, 24))
