"""Reads the graphs of a batch, packed: the nodes of all, one after another, cut by offsets, and the edges between them.

Shapes: N nodes and E edges of all graphs, B graphs, F G numbers of a node and of an edge.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightspan.core.batches import OFFSETS, described, range_on_host, require_fields, require_rows
from lightspan.core.errors import UserError


class Graphs(NamedTuple):
    """What a network of graphs reads, in the order of its arguments; see `lightspan.datamodules.graph.batch`."""

    node_NF: Tensor
    edge_index: Tensor
    edge_EG: Tensor
    offsets: Tensor


def graphs_of(batch: Any, method: str) -> Graphs:
    """The graphs of a batch.

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without these, or with others; also for offsets and edges that do not fit the nodes,
        on the CPU, where looking does not wait for a device.
    """
    require_fields(batch, method)
    found = Graphs(*(batch.get(name) for name in ("node", "edge_index", "edge", OFFSETS)))
    node, ends, edge, offsets = (value if isinstance(value, Tensor) else torch.zeros(()) for value in found)
    rows = node.is_floating_point() and node.ndim == 2 and edge.is_floating_point() and edge.ndim == 2
    links = ends.dtype == torch.int64 and ends.ndim == 2 and ends.shape[0] == 2 and ends.shape[1:] == edge.shape[:1]
    if not (rows and links and offsets.ndim == 1 and offsets.dtype == torch.int64 and len(offsets)):
        shown = ", ".join(
            f"{name} {described(value)}"
            for name, value in zip(("node", "edge_index", "edge", OFFSETS), found, strict=True)
        )
        raise UserError(
            f"{method} reads graphs as node, floats [N, F], edge_index, int64 [2, E], edge, floats [E, G], and "
            f"offsets, int64 [B + 1], and this batch has {shown}; take data whose batches are a GraphBatch "
            "(lightspan.datamodules.graph.batch)"
        )
    if isinstance(batch.get("index"), Tensor):
        require_rows(batch, "index", method)
    ends_of = range_on_host(offsets)
    if ends_of is not None and (ends_of != (0, len(node)) or int(offsets.diff().clamp_max(0).sum())):
        raise UserError(
            f"{method}: offsets of this batch must ascend from 0 to its {len(node)} nodes, and are "
            f"{offsets[:8].tolist()}"
        )
    numbered = range_on_host(found.edge_index)
    if numbered is not None and not (numbered[0] >= 0 and numbered[1] < len(node)):
        raise UserError(
            f"{method}: edge_index of this batch numbers nodes from {numbered[0]} to {numbered[1]}, and there are "
            f"{len(node)}; number them from 0 up"
        )
    return found


def kinds_of(batch: Any, nodes: int, kinds: int, method: str) -> Tensor:
    """The kind of each node, int64 [N]; 0 is none.

    Args:
        nodes: N. kinds: that a method tells apart.
        method: its name, for messages.
    Raises: UserError for a batch without them, with others, or, on the CPU, one that is not below `kinds`.
    """
    kind = batch.get("kind")
    if not (isinstance(kind, Tensor) and kind.shape == (nodes,) and kind.dtype == torch.int64):
        raise UserError(
            f"{method} reads the kind of each node as kind, int64 [{nodes}], and this batch has {described(kind)}; "
            "take data whose batches have it (lightspan.datamodules.graph.folder)"
        )
    ends = range_on_host(kind)
    if ends is not None and not (ends[0] >= 0 and ends[1] < kinds):
        raise UserError(
            f"{method}: this batch has nodes of kinds {ends[0]} to {ends[1]}, and num_kinds={kinds}; set it to "
            "data.init_args.node_kinds"
        )
    return kind
