"""How far labels are from one another: a matrix of distances, shortest paths in a graph or tree, or embeddings.

A metric may have more labels than any classifier has classes, and inner nodes of a tree are labels too. Nothing here
holds all N x N distances but the matrix that a user gives: others come in blocks of columns.

A matrix must be square, finite, not negative, symmetric and zero on its diagonal. One that breaks the triangle
inequality is taken with a warning: what weighs squared distances (`lightspan.evaluation.label_spaces.loki`) is defined
without it, and squared Euclidean distances, which people do use as a metric, break it.
Shapes: N labels, K of them from which distances are asked, E edges, D width of embeddings.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, dijkstra
from torch import Tensor

from lightspan.core.errors import UserError, one_line

BLOCK = 1 << 22
"""Distances that are held at once."""
CHECKED = 200
"""Labels whose triangles are looked at, evenly spaced."""


class LabelMetric(ABC):
    """Distances between labels that have names, and numbers from 0 in the order of these.

    Attributes:
        names: N, all different.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise UserError("a label metric has no label; give it at least one")
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        if len(self._numbers) < len(self.names):
            twice = next(name for number, name in enumerate(self.names) if self._numbers[name] != number)
            raise UserError(f"the label {one_line(twice)!r} occurs twice in a label metric; give each its own name")

    def __len__(self) -> int:
        return len(self.names)

    def numbers(self, names: Sequence[str]) -> Tensor:
        """int64 [K]. Raises: UserError for a name that the metric does not have."""
        for name in names:
            if name not in self._numbers:
                near = get_close_matches(name, self.names, n=3)
                hint = f"; did you mean {', '.join(map(one_line, near))}?" if near else ""
                raise UserError(f"{one_line(name)!r} is none of the {len(self)} labels of this metric{hint}")
        return torch.tensor([self._numbers[name] for name in names], dtype=torch.int64)

    def require_numbers(self, label_K: Tensor, whose: str) -> None:
        """Raises: UserError for labels outside [0, N)."""
        if len(label_K) and not (int(label_K.min()) >= 0 and int(label_K.max()) < len(self)):
            raise UserError(
                f"{whose} has labels from {int(label_K.min())} to {int(label_K.max())}, and the metric knows "
                f"{len(self)}, numbered from 0; give it a metric of all labels, in the order of their numbers"
            )

    @abstractmethod
    def squared_columns(self, from_K: Tensor, start: int, stop: int) -> Tensor:
        """Squared distances of these labels to those in [start, stop), float64 [K, stop - start]."""

    def squared_blocks(self, from_K: Tensor) -> Iterator[Tensor]:
        """Squared distances of these labels to all, some columns at a time in their order: float64 [K n]."""
        step = max(1, BLOCK // max(1, len(from_K)))
        for start in range(0, len(self), step):
            yield self.squared_columns(from_K, start, min(start + step, len(self)))

    def squared(self, from_K: Tensor) -> Tensor:
        """Squared distances of these labels to all, float64 [K N]: as large as that is."""
        return torch.cat([*self.squared_blocks(from_K)], dim=1)

    def squared_pairs(self, one_B: Tensor, other_B: Tensor) -> Tensor:
        """Squared distance of each pair of labels, float64 [B]."""
        found_B = torch.zeros(len(one_B), dtype=torch.float64)
        distinct_K, place_B = one_B.cpu().unique(return_inverse=True)
        other_B, start = other_B.cpu(), 0
        for block_Kn in self.squared_blocks(distinct_K):
            here_B = (other_B >= start) & (other_B < start + block_Kn.shape[1])
            found_B[here_B] = block_Kn[place_B[here_B], other_B[here_B] - start]
            start += block_Kn.shape[1]
        return found_B.to(one_B.device)


class MatrixMetric(LabelMetric):
    """Distances as a matrix.

    Args:
        distance_NN: symmetric, at least 0 and finite, 0 on the diagonal.
        names: of the labels; None names them by their numbers.
    Raises: UserError for any other matrix. Warns of one that breaks the triangle inequality.
    """

    def __init__(self, distance_NN: Tensor, names: Sequence[str] | None = None) -> None:
        if distance_NN.ndim != 2 or distance_NN.shape[0] != distance_NN.shape[1]:
            raise UserError(f"a matrix of label distances must be square, but is {list(distance_NN.shape)}")
        super().__init__([*map(str, range(len(distance_NN)))] if names is None else names)
        if len(self) != len(distance_NN):
            raise UserError(
                f"{len(self)} names do not fit label distances {list(distance_NN.shape)}; give one for each"
            )
        self.distance_NN = distance_NN.double().cpu()
        self._require_distances()
        _warn_of_detours(self.distance_NN, self.names)

    def squared_columns(self, from_K: Tensor, start: int, stop: int) -> Tensor:
        return self.distance_NN[from_K.cpu(), start:stop].square()

    def _require_distances(self) -> None:
        distance_NN = self.distance_NN
        for wrong_NN, what in (
            (~distance_NN.square().isfinite(), "must be finite, and so must its square"),
            (distance_NN < 0, "must not be negative"),
            (torch.eye(len(self), dtype=torch.bool) & (distance_NN != 0), "must be 0, of a label to itself"),
            ((distance_NN - distance_NN.T).abs() > 1e-6 * distance_NN.abs().amax(), "must be the same both ways"),
        ):
            if wrong_NN.any():
                one, other = (int(place) for place in wrong_NN.nonzero()[0])
                raise UserError(
                    f"the distance of label {one_line(self.names[one])!r} to {one_line(self.names[other])!r} is "
                    f"{float(distance_NN[one, other]):g}, back {float(distance_NN[other, one]):g}; it {what}"
                )


class EmbeddingMetric(LabelMetric):
    """Euclidean distances of embeddings of the labels, such as those of their texts.

    Args:
        x_ND: a row for each label, finite.
        names: of the labels; None names them by their numbers.
    """

    def __init__(self, x_ND: Tensor, names: Sequence[str] | None = None) -> None:
        if x_ND.ndim != 2 or not x_ND.double().square().sum().isfinite():
            raise UserError(f"embeddings of labels must be finite rows [N, D], but are {list(x_ND.shape)}")
        super().__init__([*map(str, range(len(x_ND)))] if names is None else names)
        if len(self) != len(x_ND):
            raise UserError(f"{len(self)} names do not fit embeddings {list(x_ND.shape)}; give one for each row")
        self.x_ND = x_ND.double().cpu()
        self.x_ND = self.x_ND - self.x_ND.mean(dim=0)  # the squares of what all have in common would cancel

    def squared_columns(self, from_K: Tensor, start: int, stop: int) -> Tensor:
        from_K = from_K.cpu()
        one_KD, other_nD = self.x_ND[from_K], self.x_ND[start:stop]
        lengths_Kn = one_KD.square().sum(dim=1)[:, None] + other_nD.square().sum(dim=1)
        squared_Kn = (lengths_Kn - 2 * one_KD @ other_nD.T).clamp_min(0)
        return squared_Kn.masked_fill(from_K[:, None] == torch.arange(start, stop), 0)


class GraphMetric(LabelMetric):
    """Lengths of shortest paths in a connected graph, such as a tree; every edge counts 1 or has a length.

    Args:
        edges: pairs of names, each pair once, in either direction.
        lengths: of the edges, above 0 and finite; None for 1 each.
        labels: names of the nodes that are labels, in the order of their numbers; the other nodes follow them. None
            takes nodes in the order in which the edges name them.
        only_labels: the other nodes are no labels: paths lead over them, but nothing is predicted there.
    Raises: UserError for a graph in parts, edges from a node to itself or given twice, lengths out of range, or a label
        that no edge names, unless it is the only node.
    """

    def __init__(
        self,
        edges: Sequence[Sequence[str]],
        lengths: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        only_labels: bool = False,
    ) -> None:
        nodes = dict.fromkeys(name for edge in edges for name in edge)
        first = list(nodes if labels is None else labels)
        named = set(first)
        super().__init__(first if only_labels else [*first, *(name for name in nodes if name not in named)])
        if nodes and (unknown := [name for name in first if name not in nodes]):
            raise UserError(
                f"no edge of the graph names the label {one_line(unknown[0])!r}; connect it, or leave it out"
            )
        places = {name: place for place, name in enumerate(dict.fromkeys([*self.names, *nodes]))}
        self.edges, self.nodes = _numbered_edges(edges, places), tuple(places)
        lengths_E = np.ones(len(edges)) if lengths is None else np.asarray(lengths, dtype=np.float64)
        if lengths_E.shape != (len(edges),) or not (np.isfinite(lengths_E) & (lengths_E > 0)).all():
            raise UserError(
                f"lengths of edges must be {len(edges)} finite numbers above 0; leave them out for 1 each, and join "
                "nodes that are the same"
            )
        self.lengths = tuple(lengths_E.tolist())
        one_E, other_E = self.edges.T if len(edges) else np.zeros((2, 0), dtype=np.int64)
        self.graph = coo_matrix((lengths_E, (one_E, other_E)), shape=(len(places), len(places))).tocsr()
        parts, part_of = connected_components(self.graph, directed=False)
        if parts > 1:
            apart = [name for name, place in places.items() if part_of[place] != part_of[0]]
            raise UserError(
                f"the graph of labels is in {parts} parts: no path leads from {one_line(next(iter(places)))!r} to "
                f"{one_line(apart[0])!r}; add the edge that joins them"
            )

    def of_all_nodes(self) -> "GraphMetric":
        """The same graph, all of whose nodes are labels; those of this metric come first."""
        named = [(self.nodes[one], self.nodes[other]) for one, other in self.edges]
        return self if len(self.nodes) == len(self) else GraphMetric(named, self.lengths, self.names)

    @property
    def is_tree(self) -> bool:
        """Whether it is a tree, all of whose nodes are labels."""
        return len(self.edges) == len(self) - 1 and len(self.nodes) == len(self)

    def squared_columns(self, from_K: Tensor, start: int, stop: int) -> Tensor:
        from_K = from_K.cpu()
        # From the side with fewer labels: paths from a label are found to all others at once.
        if len(from_K) <= stop - start:
            return self._from(from_K.numpy())[:, start:stop]
        return self._from(np.arange(start, stop))[:, from_K].T

    def squared_blocks(self, from_K: Tensor) -> Iterator[Tensor]:
        """As those of any metric; paths from few labels are looked for once."""
        if len(from_K) * len(self.nodes) > 32 * BLOCK:
            yield from super().squared_blocks(from_K)
        elif len(from_K):
            yield from self._from(from_K.cpu().numpy()).split(max(1, BLOCK // len(from_K)), dim=1)
        else:
            yield torch.zeros(0, len(self), dtype=torch.float64)

    def distance_to_set(self, set_K: Tensor) -> Tensor:
        """Distance of each label to the nearest of a set, float64 [N]."""
        found = dijkstra(self.graph, directed=False, indices=set_K.cpu().numpy(), min_only=True)
        return torch.from_numpy(found[: len(self)])

    def paths(self, set_K: Tensor) -> Tensor:
        """bool [N]: the labels on the shortest paths between members of a set, in a tree."""
        assert self.is_tree
        on_path_N = torch.zeros(len(self), dtype=torch.bool)
        root, *others = set_K.tolist()
        _, before = breadth_first_order(self.graph, root, directed=False, return_predecessors=True)
        on_path_N[root] = True
        for node in others:
            while not on_path_N[node]:
                on_path_N[node] = True
                node = int(before[node])
        return on_path_N

    def _from(self, places: np.ndarray) -> Tensor:
        """Squared distances of these nodes to all labels, [K N]."""
        found = dijkstra(self.graph, directed=False, indices=places)
        return torch.from_numpy(found[:, : len(self)]).square()


def ring(count: int) -> GraphMetric:
    """Labels on a circle: the distance of two is the number of steps the shorter way round. Raises: UserError for fewer
    than three.
    """
    if count < 3:
        raise UserError(f"labels on a circle must be at least 3, but count={count}")
    return GraphMetric([(str(number), str((number + 1) % count)) for number in range(count)])


def _numbered_edges(edges: Sequence[Sequence[str]], places: dict[str, int]) -> np.ndarray:
    """int64 [E 2]."""
    seen: set[frozenset[str]] = set()
    for edge in edges:
        if len(edge) != 2 or edge[0] == edge[1] or frozenset(edge) in seen:
            raise UserError(
                f"the edge {[one_line(name) for name in edge]} of a graph of labels must join two different ones, and "
                "stand once"
            )
        seen.add(frozenset(edge))
    return np.array([[places[name] for name in edge] for edge in edges], dtype=np.int64).reshape(-1, 2)


def _warn_of_detours(distance_NN: Tensor, names: Sequence[str]) -> None:
    kept = torch.linspace(0, len(names) - 1, min(CHECKED, len(names))).round().long()
    direct_CC = distance_NN[kept][:, kept]
    slack = 1e-9 * direct_CC.amax()
    for place, via_C in zip(kept.tolist(), direct_CC, strict=True):
        shorter_CC = direct_CC > via_C[:, None] + via_C + slack
        if shorter_CC.any():
            one, other = (names[int(kept[end])] for end in shorter_CC.nonzero()[0])
            warnings.warn(
                f"these label distances break the triangle inequality: from {one_line(one)!r} to {one_line(other)!r} "
                f"it is shorter by way of {one_line(names[place])!r}; if they are squares, give their roots",
                stacklevel=3,
            )
            return
