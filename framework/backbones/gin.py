"""Graph isomorphism networks, which sum over neighbours.

Source: Xu et al., "How Powerful are Graph Neural Networks?", 2018, arXiv 1810.00826, equation 4.1 with epsilon 0; edges
as in Hu et al., "Strategies for Pre-training Graph Neural Networks", 2020, arXiv 1905.12265, appendix A.
Shapes: N nodes and E edges of all graphs, B graphs, F G numbers of a node and of an edge, D width.
"""

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ragged import ragged_means
from lightspan.core.ranges import require_in
from lightspan.nn.row_norm import RowNorm

# A recipe may name the classes listed here.
__all__ = ["GIN"]


class GINLayer(nn.Module):
    """h_v <- norm(MLP(h_v + own + sum over edges (u, v) of h_u + W e_uv)), [N D] -> [N D], before what follows it.

    Args:
        edge_features: G; 0 is a layer without W and own, the edge from a node to itself.
    """

    def __init__(self, width: int, edge_features: int) -> None:
        super().__init__()
        self.edge = nn.Linear(edge_features, width, bias=False) if edge_features else None
        self.own = nn.Parameter(torch.zeros(width)) if edge_features else None
        if self.edge is not None and self.own is not None:
            nn.init.xavier_uniform_(self.edge.weight)
            nn.init.uniform_(self.own, -((6 / (width + edge_features)) ** 0.5), (6 / (width + edge_features)) ** 0.5)
            self.edge.parameter_kinds = {"weight": "embeddings"}  # type: ignore[assignment]
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm = RowNorm(width)

    def forward(self, h_ND: Tensor, edge_index: Tensor, edge_EG: Tensor) -> Tensor:
        come_E, go_E = edge_index
        message_ED, sum_ND = h_ND[come_E], wide(h_ND)
        if self.edge is not None and self.own is not None:
            message_ED = message_ED + self.edge(edge_EG.to(self.edge.weight.dtype))
            sum_ND = sum_ND + self.own
        # In float32 or wider: a node may have any number of neighbours.
        sum_ND = sum_ND.index_add(0, go_E, message_ED.to(sum_ND.dtype))
        out_ND: Tensor = self.norm(self.mlp(sum_ND.to(next(self.mlp.parameters()).dtype)))
        return out_ND


class GIN(nn.Module):
    """Packed nodes [N F], edges [2 E] with [E G] numbers, and the offsets [B+1] that cut the nodes into graphs -> the
    mean over the nodes of each, [B D]; 0 of a graph without nodes.

    Edges go from their first node to their second: what has no direction is there both ways
    (`lightspan.datamodules.graph.batch`).

    Args:
        in_features: F. edge_features: G, of which none is used if it is 0.
        width, depth: D and the number of layers.
        dropout: share of the numbers of a node that are dropped after each layer, in [0, 1).
    Raises: UserError for sizes below 1.
    """

    def __init__(
        self, in_features: int = 128, edge_features: int = 8, width: int = 300, depth: int = 5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_in("[1, inf)", in_features=in_features, width=width, depth=depth)
        require_in("[0, inf)", edge_features=edge_features)
        require_in("[0, 1)", dropout=dropout)
        self.in_features, self.edge_features = in_features, edge_features
        self.width = self.num_features = width
        self.embedding = nn.Linear(in_features, width, bias=False)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.embedding.parameter_kinds = {"weight": "embeddings"}  # type: ignore[assignment]
        self.layers = nn.ModuleList(GINLayer(width, edge_features) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def embed(self, node_NF: Tensor) -> Tensor:
        """[N D]. Raises: UserError for another number of columns than `in_features`."""
        if node_NF.shape[1] != self.in_features:
            raise UserError(
                f"GIN: in_features={self.in_features}, but a node of this batch has {node_NF.shape[1]} numbers; set "
                f"in_features to {node_NF.shape[1]}"
            )
        embedded_ND: Tensor = self.embedding(node_NF.to(self.embedding.weight.dtype))
        return embedded_ND

    def nodes(self, h_ND: Tensor, edge_index: Tensor, edge_EG: Tensor) -> Tensor:
        """What becomes of embedded nodes, [N D]. Raises: UserError for another number of columns of edges."""
        if self.edge_features and edge_EG.shape[1] != self.edge_features:
            raise UserError(
                f"GIN: edge_features={self.edge_features}, but an edge of this batch has {edge_EG.shape[1]} numbers; "
                f"set edge_features to {edge_EG.shape[1]}"
            )
        for number, layer in enumerate(self.layers, 1):
            h_ND = layer(h_ND, edge_index, edge_EG)
            h_ND = self.dropout(h_ND.relu() if number < len(self.layers) else h_ND)
        return h_ND

    def forward(self, node_NF: Tensor, edge_index: Tensor, edge_EG: Tensor, offsets: Tensor) -> Tensor:
        return ragged_means(self.nodes(self.embed(node_NF), edge_index, edge_EG), offsets)
