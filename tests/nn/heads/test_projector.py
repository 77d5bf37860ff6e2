import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.projector import Projector


def test_layers_follow_the_published_order_and_end_without_norm_or_activation() -> None:
    head = Projector(8, [16, 32], 64)
    assert [type(layer) for layer in head.layers] == 2 * [nn.Linear, nn.BatchNorm1d, nn.ReLU] + [nn.Linear]
    assert head(torch.randn(5, 8)).shape == (5, 64)
    assert (head.in_features, head.out_features) == (8, 64)


def test_a_hidden_bias_is_undone_by_its_batchnorm_and_can_be_left_out() -> None:
    head = Projector(8, [16], 4)
    x = torch.randn(10, 8)
    before = head(x)
    with torch.no_grad():
        head.layers[0].bias += 3.0
    torch.testing.assert_close(head(x), before, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in Projector(8, [16], 4, bias=False).named_parameters() if name == "layers.0.bias"]


def test_a_layer_norm_at_the_end_gives_every_embedding_mean_0_and_variance_1() -> None:
    head = Projector(8, [16], 64, layer_norm=True)
    assert isinstance(head.layers[-1], nn.LayerNorm)
    z = head(torch.randn(5, 8))
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(dim=1, correction=0), torch.ones(5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("hidden", [[], [0]])
def test_impossible_widths_are_refused(hidden: list[int]) -> None:
    with pytest.raises(UserError, match=r"hidden=\[.*\], out_features=4: each must be at least 1 .*torch.nn.Linear"):
        Projector(8, hidden, 4)
