"""Where syntax lives in a network: a linear probe of each layer that rebuilds whole syntax trees.

Source: Hernández López, Weyssow, Sánchez Cuadrado, Sahraoui, "AST-Probe: Recovering abstract syntax trees from hidden
representations of pre-trained language models", ASE 2022, arXiv 2206.11719, section 3 and its appendix.
`lightspan.evaluation.syntax.trees` says how a tree becomes heights d and labels c of gaps and labels u of words.

Two differences. Features are brought to mean 0 and deviation 1 by the words that the probe learns from: the blocks of
causal models leave a few features a thousand times larger than the rest, which would be all that a distance sees.
And labels are those of the trees that the probe learns from; one of another tree cannot be guessed.
Shapes: N texts, B of a batch, n words of the longest, D features, M dimensions of the probe, C and U labels, P pairs.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.generators import drawn_from
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.scale import scaled
from lightspan.evaluation.scaling_laws import bootstrapped
from lightspan.evaluation.syntax.code_features import CodeFeatures
from lightspan.evaluation.syntax.python_trees import LeftOutCode
from lightspan.evaluation.syntax.trees import SyntaxNode, TreeScore, TreeSequences, decode, encode, tree_score

FEWEST = 5
"""Texts of at least two words: of five, three teach, one chooses and one is asked."""
UNKNOWN = -100
"""A label that no tree had from which the probe learns, and the padding."""


def rank_hinge(guess_BG: Tensor, d_BG: Tensor, valid_BG: Tensor) -> Tensor:
    """Mean of max(0, 1 - (g_i - g_j)) over all pairs of gaps of one text with d_i > d_j; 0 without any.

    Args:
        guess_BG: of heights, at any scale.
        d_BG: heights, of which the order counts alone.
        valid_BG: bool, False on padding.
    """
    higher_BGG = (d_BG[:, :, None] > d_BG[:, None, :]) & valid_BG[:, :, None] & valid_BG[:, None, :]
    apart_BGG = guess_BG[:, :, None] - guess_BG[:, None, :]
    return torch.where(higher_BGG, (1 - apart_BGG).clamp_min(0), 0).sum() / higher_BGG.sum().clamp_min(1)


class SyntaxProbe(nn.Module):
    """z = x B; a gap's height is |z_{i+1} - z_i|^2, its label's scores (z_{i+1} - z_i) C, those of a word z_i U. No
    bias, and weights begin uniform in [-0.05, 0.05].

    Raises: UserError for a width or dimensions below 1.
    """

    def __init__(self, width: int, dimensions: int, labels: int, unary: int) -> None:
        super().__init__()
        if min(width, dimensions) < 1:
            raise UserError(f"a SyntaxProbe needs a feature and a dimension, and got {width} and {dimensions}")
        shapes = {"basis_DM": (width, dimensions), "labels_MC": (dimensions, labels), "unary_MU": (dimensions, unary)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-0.05, 0.05)))

    basis_DM: nn.Parameter
    labels_MC: nn.Parameter
    unary_MU: nn.Parameter

    def forward(self, x_BnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(heights [B n-1], scores of their labels [B n-1 C], scores of the words' [B n U])."""
        z_BnM = x_BnD @ self.basis_DM
        gap_BGM = z_BnM[:, 1:] - z_BnM[:, :-1]
        return gap_BGM.square().sum(dim=-1), gap_BGM @ self.labels_MC, z_BnM @ self.unary_MU

    def orthogonality(self) -> Tensor:
        """|B^T B - 1|_F^2."""
        gram_MM = self.basis_DM.T @ self.basis_DM
        return (gram_MM - torch.eye(len(gram_MM), device=gram_MM.device, dtype=gram_MM.dtype)).square().sum()


class TreeBatch(NamedTuple):
    """Texts and their trees, padded at the end; labels are UNKNOWN there, words False."""

    x_BnD: Tensor
    d_BG: Tensor
    c_BG: Tensor
    u_Bn: Tensor
    word_Bn: Tensor


def probe_loss(probe: SyntaxProbe, batch: TreeBatch, orthogonal: float) -> Tensor:
    """The rank hinge of heights, the cross entropies of both labels, and `orthogonal` times |B^T B - 1|_F^2."""
    d_BG, c_BGC, u_BnU = probe(batch.x_BnD)
    ordered = rank_hinge(d_BG, batch.d_BG, batch.word_Bn[:, 1:])
    return ordered + _nats(c_BGC, batch.c_BG) + _nats(u_BnU, batch.u_Bn) + orthogonal * probe.orthogonality()


def _nats(scores: Tensor, label: Tensor) -> Tensor:
    """Mean over the labels that are known; 0 without any."""
    total = cross_entropy(scores.flatten(0, 1), label.flatten(), ignore_index=UNKNOWN, reduction="sum")
    return total / (label != UNKNOWN).sum().clamp_min(1)


class ReadingProbe(NamedTuple):
    """A probe, and what its words' features are brought to 0 and 1 by."""

    probe: SyntaxProbe
    mean_D: Tensor
    scale_D: Tensor

    def read(self, x_nD: Tensor, c: Sequence[str], u: Sequence[str]) -> SyntaxNode:
        """The tree that the probe sees in a text of at least one word."""
        with torch.no_grad():
            d_1G, c_1GC, u_1nU = self.probe((((x_nD - self.mean_D) / self.scale_D).float())[None])
        names = [[known[i] for i in scores[0].argmax(dim=1).tolist()] for known, scores in ((c, c_1GC), (u, u_1nU))]
        return decode(d_1G[0].tolist(), *names)


@dataclass(frozen=True)
class SyntaxByLayer(Result):
    """How well probes rebuild trees; see `lightspan.evaluation.syntax.ast_probe`.

    Attributes:
        rows: mappings with network ("" is the one that is asked about, others are controls), layer, f1, error (its
            standard error over texts), precision, recall, all of texts that no probe saw; chosen (F1 on the texts that
            end the learning), epochs (until the probe that is kept).
        best: the layer of the network with the largest `chosen`.
        floors: F1 of what knows less, by name: the tree that leans to the right with the commonest labels; layer 0;
            each control at its own best layer, chosen alike.
        gains: F1 of the best layer less each floor: floor, gain, low and high, ends of the 95 % interval over texts.
        texts: that taught, chose, and were asked.
        words, labels, unary: how many there are to learn from.
        dimensions: of the probes.
        left_out: mappings with what, why, number and of (how many), from files to texts.
    """

    rows: tuple[dict[str, Any], ...]
    best: int
    floors: dict[str, float]
    gains: tuple[dict[str, Any], ...]
    texts: tuple[int, ...]
    words: int
    labels: int
    unary: int
    dimensions: int
    left_out: tuple[dict[str, Any], ...] = ()

    def figures(self) -> tuple[Figure, ...]:
        best = next(row for row in self.rows if row["network"] == "" and row["layer"] == self.best)
        found = [
            Figure(f"F1 of trees from the best layer, {self.best}", best["f1"]),
            *(Figure(f"its floor: {name}", value) for name, value in self.floors.items()),
        ]
        for one in self.gains:
            found += [
                Figure(f"gain over {one['floor']}", one["gain"]),
                Figure(f"its interval begins: over {one['floor']}", one["low"]),
                Figure(f"its interval ends: over {one['floor']}", one["high"]),
            ]
        of_texts = zip(("from which probes learn", "that choose", "that are asked"), self.texts, strict=True)
        return (
            *found,
            *(Figure(f"texts {what}", number) for what, number in of_texts),
            Figure("dimensions of a probe", self.dimensions),
            Figure("labels of gaps", self.labels),
            Figure("labels of words", self.unary),
            *(Figure(f"left out of {one['of']:,} {one['what']}, {one['why']}", one["number"]) for one in self.left_out),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        floor = {"floor": self.floors[RIGHT]}
        return tuple({**row, "network": row["network"] or "network"} | floor for row in self.rows)

    def draw(self, axes: Any) -> None:
        networks = dict.fromkeys(row["network"] for row in self.rows)
        for name, colour in zip(networks, (COLOURS[0], *[SOFT, *COLOURS[1:]] * len(networks)), strict=False):
            rows = [row for row in self.rows if row["network"] == name]
            x, y, reach = ([row[key] for row in rows] for key in ("layer", "f1", "error"))
            axes.errorbar(x, y, reach, color=colour, marker="o", markersize=3, linewidth=1.5, label=name or "network")
        name, floor = next(iter(self.floors.items()))
        axes.axhline(floor, color=SOFT, linestyle="--", linewidth=1.2, label=f"floor: {name}")
        axes.set(xlabel="layer, 0 being the embeddings", ylabel="F1 of trees", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)


RIGHT, EMBEDDINGS = "leaning right, commonest labels", "layer 0, the embeddings"


class ASTProbe(Estimator):
    """A probe of each layer, which learns to rebuild the trees of some texts and is asked about those of others.

    Of the texts, in the order in which they come, 64 % teach, 16 % choose when a probe stops and which layer is best,
    and 20 % are asked. Texts of a single word have no gap, and are left out. Adam; its rate falls to a tenth when the
    loss on the texts that choose does not fall. With a few hundred texts an epoch is a few steps, and that loss may
    rise before it falls: wait longer then, or every probe, above all those of controls, stops before it has learned.

    Args:
        dimensions: of the probe's space, at least 1; as many as a layer has features, if those are fewer.
        orthogonal: weight of |B^T B - 1|_F^2, at least 0.
        rate: above 0.
        epochs: at most so many, at least 1; the paper has 20, of 20,000 texts.
        patience: epochs without a lower loss after which a probe stops, at least 1.
        rate_patience: such epochs before the rate falls, at least 0, as in the paper.
        batch_size: texts, at least 1.
        seed: of first weights and batches, at least 0.
    """

    def __init__(
        self,
        dimensions: int = 128,
        orthogonal: float = 5.0,
        rate: float = 1e-3,
        epochs: int = 20,
        patience: int = 5,
        rate_patience: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("dimensions", dimensions, 1), ("epochs", epochs, 1), ("patience", patience, 1),
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("orthogonal", orthogonal, 0),
            ("rate_patience", rate_patience, 0),
        ):  # fmt: skip
            if not least <= value < math.inf:
                raise UserError(f"ASTProbe {name}={value} must be at least {least} and finite")
        if not 0 < rate < math.inf:
            raise UserError(f"ASTProbe rate={rate} must be above 0 and finite")
        self.dimensions, self.orthogonal, self.rate, self.epochs = dimensions, orthogonal, rate, epochs
        self.patience, self.rate_patience, self.batch_size, self.seed = patience, rate_patience, batch_size, seed

    def fit(self, code: CodeFeatures) -> SyntaxByLayer:
        """Raises: UserError for no layer, fewer than 5 texts of two words or more, features that are not finite or not
        [words D] of the trees' words, and trees as `lightspan.evaluation.syntax.trees.require_tree`.
        """
        if not code.layers:
            raise UserError("ASTProbe got no layer; name at least one in layers")
        encoded = [encode(tree) for tree in code.trees]
        ends = np.cumsum([0, *(len(each.u) for each in encoded)]).tolist()
        usable = [i for i, each in enumerate(encoded) if len(each.u) > 1]
        if len(usable) < FEWEST:
            raise UserError(f"ASTProbe got {len(usable)} texts of two words or more, but needs {FEWEST}; take more")
        left_out = code.left_out
        if len(usable) < len(encoded):
            left_out = (*left_out, LeftOutCode("texts", "a single word", len(encoded) - len(usable), len(encoded)))
        seen, asked = _cut(usable)
        teaching, choosing = _cut(seen)
        c, u = ([*Counter(_all([labels(each) for each in encoded], teaching))] for labels in _LABELS)
        right = _leaning_right([encoded[i] for i in teaching])
        scores: dict[tuple[str, int], list[TreeScore]] = {}
        rows: list[dict[str, Any]] = []
        for name, layers in {"": code.layers, **code.controls}.items():
            for layer, x_WD in sorted(layers.items()):
                x_WD = _checked(name, layer, x_WD, ends[-1])
                texts = [x_WD[first:last] for first, last in pairwise(ends)]
                learned, epochs = self._learn(texts, encoded, teaching, choosing, c, u)
                found = [
                    [tree_score(learned.read(texts[i], c, u), code.trees[i]) for i in part]
                    for part in (choosing, asked)
                ]
                scores[name, layer] = found[1]
                precision, recall, f1 = (np.array([score[k] for score in found[1]]) for k in range(3))
                rows.append(
                    {"network": name, "layer": layer, "f1": float(f1.mean())}
                    | {"error": float(f1.std(ddof=1) / len(f1) ** 0.5) if len(f1) > 1 else 0.0}
                    | {"precision": float(precision.mean()), "recall": float(recall.mean())}
                    | {"chosen": float(np.mean([score.f1 for score in found[0]])), "epochs": epochs}
                )
        best = {name: _best(rows, name) for name in ("", *(name for name in code.controls if code.controls[name]))}
        floors = {RIGHT: [tree_score(right(len(encoded[i].u)), code.trees[i]).f1 for i in asked]}
        floors |= {EMBEDDINGS: [score.f1 for score in scores["", 0]]} if 0 in code.layers else {}
        floors |= {name: [score.f1 for score in scores[name, layer]] for name, layer in best.items() if name}
        ours = np.array([score.f1 for score in scores["", best[""]]])
        return SyntaxByLayer(
            rows=tuple(rows),
            best=best[""],
            floors={name: float(np.mean(values)) for name, values in floors.items()},
            gains=tuple({"floor": name} | _gain(ours - np.array(values)) for name, values in floors.items()),
            texts=(len(teaching), len(choosing), len(asked)),
            words=sum(len(encoded[i].u) for i in teaching),
            labels=len(c),
            unary=len(u),
            dimensions=min(self.dimensions, *(x.shape[1] for x in code.layers.values())),
            left_out=tuple(one._asdict() for one in left_out),
        )

    def _learn(
        self,
        texts: Sequence[Tensor],
        encoded: Sequence[TreeSequences],
        teaching: Sequence[int],
        choosing: Sequence[int],
        c: Sequence[str],
        u: Sequence[str],
    ) -> tuple[ReadingProbe, int]:
        """(the probe with the lowest loss on the texts that choose, after how many epochs); without touching any random
        state.
        """
        scale_D, mean_D = torch.std_mean(torch.cat([texts[i] for i in teaching]), dim=0, correction=0)
        scale_D = torch.where(scale_D > 1e-12, scale_D, 1)
        numbers = [{label: i for i, label in enumerate(known)} for known in (c, u)]

        def batch(part: Sequence[int]) -> TreeBatch:
            x = pad_sequence([((texts[i] - mean_D) / scale_D).float() for i in part], batch_first=True)
            c_BG, u_Bn = (
                pad_sequence(
                    [torch.tensor([known.get(label, UNKNOWN) for label in labels(encoded[i])]) for i in part],
                    batch_first=True,
                    padding_value=UNKNOWN,
                )
                for labels, known in zip(_LABELS, numbers, strict=True)
            )
            d_BG = pad_sequence([torch.tensor(encoded[i].d, dtype=torch.float32) for i in part], batch_first=True)
            word_Bn = pad_sequence([torch.ones(len(encoded[i].u), dtype=torch.bool) for i in part], batch_first=True)
            return TreeBatch(x, d_BG, c_BG, u_Bn, word_Bn)

        held = [batch(choosing[i : i + self.batch_size]) for i in range(0, len(choosing), self.batch_size)]
        with torch.inference_mode(False), torch.enable_grad(), drawn_from(self.seed):
            width = len(mean_D)
            probe = SyntaxProbe(width, min(self.dimensions, width), len(c), len(u))
            optimizer = torch.optim.Adam(probe.parameters(), lr=self.rate)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=self.rate_patience)
            lowest, kept, at = math.inf, {name: x.clone() for name, x in probe.state_dict().items()}, 0
            for epoch in range(1, self.epochs + 1):
                order = [teaching[i] for i in torch.randperm(len(teaching)).tolist()]
                for first in range(0, len(order), self.batch_size):
                    loss = probe_loss(probe, batch(order[first : first + self.batch_size]), self.orthogonal)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad():
                    sizes = [len(each.x_BnD) for each in held]
                    losses = [float(probe_loss(probe, each, self.orthogonal)) for each in held]
                reached = float(np.average(losses, weights=sizes))
                schedule.step(reached)
                if reached < lowest:
                    lowest, kept, at = reached, {name: x.clone() for name, x in probe.state_dict().items()}, epoch
                elif epoch - at >= self.patience:
                    break
            probe.load_state_dict(kept)
        return ReadingProbe(probe.eval().requires_grad_(False), mean_D, scale_D), at


_LABELS: tuple[Callable[[TreeSequences], tuple[str, ...]], ...] = (lambda tree: tree.c, lambda tree: tree.u)
"""Of gaps, and of words."""


def _checked(name: str, layer: int, x_WD: Tensor, words: int) -> Tensor:
    """Features of a layer near 1, in float64 on the CPU."""
    of = f"layer {layer}" + (f" of {name}" if name else "")
    if x_WD.ndim != 2 or len(x_WD) != words or not x_WD.shape[1]:
        raise UserError(f"ASTProbe: {of} has features {list(x_WD.shape)}, and the trees have {words} words")
    if not x_WD.isfinite().all():
        raise UserError(f"ASTProbe: features of {of} are NaN or infinite; the model has diverged")
    return scaled(x_WD)[1][0].cpu()


def _cut(texts: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """(the first four fifths, the rest), at least one in the rest."""
    first = len(texts) - max(1, len(texts) // 5)
    return texts[:first], texts[first:]


def _all(labels: Sequence[Sequence[str]], part: Sequence[int]) -> list[str]:
    return [label for i in part for label in labels[i]]


def _leaning_right(encoded: Sequence[TreeSequences]) -> Callable[[int], SyntaxNode]:
    """words -> the tree whose root has the commonest label of roots, and whose gaps and words have the commonest."""
    root = Counter(each.c[int(np.argmax(each.d))] for each in encoded).most_common(1)[0][0]
    commonest = [
        Counter(label for each in encoded for label in labels(each)).most_common(1)[0][0] for labels in _LABELS
    ]

    def tree(words: int) -> SyntaxNode:
        c = [root] + [commonest[0]] * (words - 2)
        return decode([float(words - i) for i in range(words - 1)], c, [commonest[1]] * words)

    return tree


def _best(rows: Sequence[Mapping[str, Any]], network: str) -> int:
    of = [row for row in rows if row["network"] == network]
    return int(max(of, key=lambda row: row["chosen"])["layer"])


def _gain(apart_N: np.ndarray) -> dict[str, float]:
    found = bootstrapped(lambda share_N: float(share_N @ apart_N), len(apart_N))
    ends = {"low": found.low, "high": found.high}
    return {"gain": found.value} | {name: found.value if end is None else end for name, end in ends.items()}
