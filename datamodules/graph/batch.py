"""Batches of graphs, packed: the nodes of all samples, one after another, and so their edges.

Shapes: B graphs, N nodes and E edges of all of them together, F G numbers of a node and of an edge.
"""

from typing import Annotated, NotRequired, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label


class GraphBatch(TypedDict):
    """Graphs of any numbers of nodes and edges. A sample of a dataset is one graph without `offsets`, whose nodes count
    from 0.

    node: what is known of each node.
    edge_index: the two nodes of each edge, from the first to the second; in a batch they count through all graphs. An
        edge without a direction is there twice, once each way.
    edge: what is known of each edge; of G = 0 numbers where nothing is.
    offsets: graph i has the nodes from offsets[i] up to offsets[i + 1].
    kind: of each node, such as the number of its element; 0 is none that is known.
    """

    node: Annotated[Tensor, Field("float32", "N F", read=True)]
    edge_index: Annotated[Tensor, Field("int64", "2 E", read=True, points_to="N")]
    edge: Annotated[Tensor, Field("float32", "E G", read=True)]
    offsets: Annotated[Tensor, Field("int64", "B+1", read=True, cuts="N")]
    kind: NotRequired[Annotated[Tensor, Field("int64", "N")]]
    label: Label
    index: Index
