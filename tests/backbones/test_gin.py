"""GIN against a plain loop and torch_geometric; what its features may depend on; graphs without nodes or edges."""

import pytest
import torch
from torch import Tensor

from lightspan.backbones.gin import GIN, GINLayer
from lightspan.core.errors import UserError

EDGES = torch.tensor([[0, 1, 1, 2, 3, 5, 3], [1, 0, 2, 1, 5, 3, 1]])
"""Of six nodes, of which the fifth has none."""


def given(edge_features: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    node, edge = torch.randn(6, 3, generator=generator), torch.randn(7, edge_features, generator=generator)
    return node, EDGES, edge, torch.tensor([0, 6])


def network(edge_features: int = 2, **settings: int) -> GIN:
    torch.manual_seed(0)
    return GIN(3, edge_features, **{"width": 4, "depth": 2} | settings)


def test_a_layer_is_its_equation() -> None:
    torch.manual_seed(0)
    layer, h = GINLayer(4, 2).eval(), torch.randn(6, 4)
    edge = given()[2]
    assert layer.edge is not None
    assert layer.own is not None
    for node in range(6):
        total = h[node] + layer.own
        for number in (EDGES[1] == node).nonzero()[:, 0].tolist():
            total = total + h[EDGES[0, number]] + layer.edge.weight @ edge[number]
        torch.testing.assert_close(layer(h, EDGES, edge)[node], layer.norm(layer.mlp(total)[None])[0])


def test_without_edge_features_a_layer_is_torch_geometrics() -> None:
    conv = pytest.importorskip("torch_geometric.nn", reason="the extra `peers` is not installed").GINConv
    torch.manual_seed(0)
    layer, h = GINLayer(4, 0), torch.randn(6, 4, requires_grad=True)
    ours, theirs = layer.norm.eval()(layer.mlp(h)), conv(layer.mlp)(h, EDGES)
    torch.testing.assert_close(layer(h, EDGES, torch.zeros(7, 0)), layer.norm(theirs), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours, layer.norm(theirs))


def test_features_are_means_over_nodes_whatever_their_order_and_the_other_graphs() -> None:
    net = network().eval()
    node, edges, edge, offsets = given()
    alone = net(node, edges, edge, offsets)
    torch.testing.assert_close(alone[0], net.nodes(net.embed(node), edges, edge).mean(0))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    place = order.argsort()
    torch.testing.assert_close(net(node[order], place[edges], edge, offsets), alone)
    mixed = torch.tensor([4, 0, 6, 1, 3, 2, 5])
    torch.testing.assert_close(net(node, edges[:, mixed], edge[mixed], offsets), alone)
    other = torch.randn(2, 3)
    both = net(torch.cat([other, node]), edges + 2, edge, torch.tensor([0, 2, 8]))
    torch.testing.assert_close(both[1], alone[0])


def test_graphs_without_edges_or_nodes_and_a_single_node_have_features() -> None:
    for mode in (True, False):
        for nodes in (0, 1, 2):
            net = network().train(mode).bfloat16() if nodes == 2 else network().train(mode)
            node, none = torch.randn(nodes, 3), torch.zeros(2, 0, dtype=torch.int64)
            features = net(node, none, torch.zeros(0, 2), torch.tensor([0, nodes, nodes]))
            assert features.shape == (2, 4)
            assert features.isfinite().all()
            assert not features[1].any()
            features.sum().backward()


def test_messages_to_a_node_of_many_neighbours_are_summed_in_float32() -> None:
    layer = GINLayer(1, 0).bfloat16().eval()
    layer.mlp, layer.norm = torch.nn.Sequential(torch.nn.PReLU()), torch.nn.Identity()  # whose weight is float32
    edges = torch.stack([torch.arange(1, 1001), torch.zeros(1000, dtype=torch.int64)])
    assert layer(torch.ones(1001, 1, dtype=torch.bfloat16), edges, torch.zeros(1000, 0))[0] == 1001


def test_the_papers_network_has_the_size_that_it_says() -> None:
    with torch.device("meta"):
        net = GIN()
    layer = 8 * 300 + 300 + 300 * 600 + 600 + 600 * 300 + 300 + 2 * 300
    assert sum(p.numel() for p in net.parameters()) == 128 * 300 + 5 * layer


def test_settings_and_batches_that_do_not_fit_are_refused() -> None:
    for settings, said in (
        ({"width": 0}, "width=0"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"edge_features": -1}, "edge_"),
    ):
        with pytest.raises(UserError, match=said):
            GIN(**settings)  # type: ignore[arg-type]
    node, edges, edge, offsets = given()
    with pytest.raises(UserError, match="in_features=3"):
        network()(node[:, :2], edges, edge, offsets)
    with pytest.raises(UserError, match="edge_features=2"):
        network()(node, edges, edge[:, :1], offsets)
