"""A syntax tree as three sequences over its words and the gaps between them, and back; how much two trees share.

Source: Hernández López, Weyssow, Sánchez Cuadrado, Sahraoui, "AST-Probe: Recovering abstract syntax trees from hidden
representations of pre-trained language models", ASE 2022, arXiv 2206.11719, section 3; the encoding is that of Shen et
al., "Straight to the Tree", ACL 2018, arXiv 1806.04168.

The tree becomes a binary one first. A node with a single child that is a node shares one label with it, a node with a
single word is the word's *unary* label, and of more than two children the second and the rest hang from a node without
a label. Where d is largest in a range of gaps, the range falls in two: the tree depends on the order of d alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightspan.core.errors import UserError

EMPTY = ""
"""The label of a node that only makes the tree a binary one, and of a word without a unary label."""
BAD_ROOT = "bad_root"
"""The label of a decoded tree whose root is to have none."""
CHAIN = " > "
"""Between the labels of nodes that share one, from the top down."""


@dataclass(frozen=True, slots=True)
class SyntaxNode:
    """A node of a syntax tree.

    Attributes:
        label: of the grammar, such as `If`; neither empty nor with ` > ` inside.
        children: at least one, in the order of the text; a word is its number, counted from 0 through the whole tree.
    """

    label: str
    children: tuple["SyntaxNode | int", ...]

    def words(self) -> tuple[int, ...]:
        """The numbers of all words below, in their order."""
        found: list[int] = []
        for child in self.children:
            found += child.words() if isinstance(child, SyntaxNode) else (child,)
        return tuple(found)


class TreeSequences(NamedTuple):
    """A tree of n words.

    Attributes:
        d: the height at which the words on both sides of a gap meet, n - 1 numbers of at least 1.
        c: the label of the node where they do, n - 1.
        u: the unary label of each word, n.
    """

    d: tuple[float, ...]
    c: tuple[str, ...]
    u: tuple[str, ...]


def require_tree(tree: SyntaxNode) -> int:
    """The number of its words. Raises: UserError for words out of order, nodes without any, and labels that are kept
    for the encoding.
    """
    waiting = [tree]
    for node in waiting:
        if not node.children or not node.label or CHAIN in node.label:
            raise UserError(
                f"a node of a syntax tree has the label {node.label!r} and {len(node.children)} children; give it a "
                f"label without {CHAIN!r}, and at least one child"
            )
        waiting += [child for child in node.children if isinstance(child, SyntaxNode)]
    words = tree.words()
    if words != tuple(range(len(words))):
        raise UserError(f"the words of a syntax tree must be 0, 1, 2, ... from left to right, and begin {words[:5]}")
    return len(words)


def encode(tree: SyntaxNode) -> TreeSequences:
    """Algorithm 1 of the paper, on the tree made binary. Raises: UserError as `require_tree`."""
    require_tree(tree)
    d: list[float] = []
    c: list[str] = []
    u: list[str] = []

    def height(child: SyntaxNode | int) -> int:
        labels: list[str] = []
        while isinstance(child, SyntaxNode) and len(child.children) == 1:
            labels.append(child.label)
            child = child.children[0]
        if not isinstance(child, SyntaxNode):
            u.append(CHAIN.join(labels))
            return 0
        first, *rest = child.children
        label = CHAIN.join([*labels, child.label])
        heights, gaps = [height(first)], list[int]()
        for other in rest:
            gaps.append(len(d))
            d.append(0)
            c.append(EMPTY if len(gaps) > 1 else label)
            heights.append(height(other))
        reached = heights.pop()
        for gap in reversed(gaps):
            reached = 1 + max(heights.pop(), reached)
            d[gap] = reached
        return reached

    height(tree)
    return TreeSequences(tuple(d), tuple(c), tuple(u))


def decode(d: Sequence[float], c: Sequence[str], u: Sequence[str]) -> SyntaxNode:
    """The tree of three sequences, which may be guesses: any numbers without NaN make one. Of equal ones the first is
    the largest. Nodes without a label give their children to the node above.

    Raises: UserError for no word, or other lengths than n - 1, n - 1 and n.
    """
    if not u or len(d) != len(u) - 1 or len(c) != len(u) - 1:
        raise UserError(f"a tree of n words has n - 1, n - 1 and n entries, and not {len(d)}, {len(c)} and {len(u)}")

    def forest(first: int, last: int) -> list[SyntaxNode | int]:
        if first == last:
            return _below(u[first], [first])
        at = first
        for gap in range(first + 1, last):
            at = gap if d[gap] > d[at] else at
        parts = forest(first, at)
        parts += forest(at + 1, last)
        return _below(c[at], parts)

    parts = forest(0, len(u) - 1)
    whole = parts[0]
    return whole if len(parts) == 1 and isinstance(whole, SyntaxNode) else SyntaxNode(BAD_ROOT, tuple(parts))


def _below(label: str, parts: list[SyntaxNode | int]) -> list[SyntaxNode | int]:
    """These under the nodes that share a label; as they are under an empty one."""
    for name in reversed(label.split(CHAIN) if label != EMPTY else ()):
        parts = [SyntaxNode(name, tuple(parts))]
    return parts


def constituents(tree: SyntaxNode) -> Counter[tuple[str, int, int]]:
    """How often a label stands over the words from a first to a last one."""
    found: Counter[tuple[str, int, int]] = Counter()
    waiting = [tree]
    for node in waiting:
        words = node.words()
        found[node.label, words[0], words[-1]] += 1
        waiting += [child for child in node.children if isinstance(child, SyntaxNode)]
    return found


class TreeScore(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float
    f1: float


def tree_score(predicted: SyntaxNode, true: SyntaxNode) -> TreeScore:
    """Precision, recall and F1 of the constituents, each counted as often as both trees have it."""
    ours, theirs = constituents(predicted), constituents(true)
    both = (ours & theirs).total()
    return TreeScore(both / ours.total(), both / theirs.total(), 2 * both / (ours.total() + theirs.total()))
