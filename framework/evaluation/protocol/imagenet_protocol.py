"""The protocol by which encoders of images are compared: neighbours, a linear head, fine-tuning on few labels.

Source: Caron et al., "DINO", 2021, arXiv 2104.14294, sections 4.1 and 4.2 (20 neighbours that vote with a temperature
of 0.07, after Wu et al., 2018, arXiv 1805.01978; a linear head); Chen et al., "SimCLR", 2020, arXiv 2002.05709 (1 % and
10 % of the labels). What each part takes from where: `lightspan.evaluation.protocol.linear_heads`, `few_labels`.
Differs from these papers: the rate of the head is chosen on a tenth of the training samples, which did not train it,
and not on the samples that are scored; the figure with their choice is given beside it. Features are what the encoder
gives, not the concatenation of several layers.
Shapes: N training samples, M evaluation samples, D features, K classes, R rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.results import Figure, Result
from lightspan.datamodules.loading.subset import balanced_part
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.labels import require_few_classes
from lightspan.evaluation.probes.knn import knn_classes
from lightspan.evaluation.probes.probe_scores import half_interval
from lightspan.evaluation.protocol.few_labels import SIMCLR, fine_tuned
from lightspan.evaluation.protocol.linear_heads import RATES, LinearHeads, fit_linear_heads
from lightspan.evaluation.protocol.subject import Judged, ProtocolSubject
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.random_subspace import OptimizerCallable

NEIGHBOURS, LINEAR, FLOOR = "nearest neighbours", "linear probe", "floor: random weights"


@dataclass(frozen=True)
class ProtocolScores(Result):
    """Accuracies on the evaluation samples, each beside that of the same network with random weights.

    Attributes:
        rows: mappings with protocol; labels, that it learned from; fewest and most, of a class; accuracy; floor; gain,
            their difference; interval, half of its 95 % interval over evaluation samples.
        rates: of the heads, for 256 samples: rate; held_out, accuracy on training samples that did not train; accuracy;
            floor.
        rate, floor_rate: that were chosen on those.
        chance: accuracy of the most frequent class.
        classes, train, evaluated: numbers of them.
    """

    rows: tuple[dict[str, Any], ...]
    rates: tuple[dict[str, float], ...]
    rate: float
    floor_rate: float
    chance: float
    classes: int
    train: int
    evaluated: int

    def row(self, protocol: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["protocol"] == protocol)

    def figures(self) -> tuple[Figure, ...]:
        found = []
        for row in self.rows:
            found += [
                Figure(row["protocol"], 100 * row["accuracy"], "%"),
                Figure(f"  {FLOOR}", 100 * row["floor"], "%"),
                Figure("  gain", 100 * row["gain"], "points"),
                Figure("  half of its 95 % interval", 100 * row["interval"], "points"),
            ]
        if self.rates:
            published = [max(row[key] for row in self.rates) for key in ("accuracy", "floor")]
            found += [
                Figure("linear probe, as papers choose", 100 * published[0], "%"),
                Figure(f"  {FLOOR}", 100 * published[1], "%"),
                Figure("rate of the linear probe", self.rate),
            ]
        return (
            *found,
            Figure("chance: accuracy of the most frequent class", 100 * self.chance, "%"),
            Figure("classes", self.classes),
            Figure("training samples", self.train),
            Figure("evaluation samples", self.evaluated),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(dict(row) for row in self.rows)

    def draw(self, axes: Any) -> None:
        place = np.arange(len(self.rows))
        for shift, key, colour, label in ((-0.2, "accuracy", COLOURS[0], "encoder"), (0.2, "floor", SOFT, FLOOR)):
            heights = [row[key] for row in self.rows]
            axes.bar(place + shift, heights, 0.38, color=colour, label=label)
            for at, height in zip(place + shift, heights, strict=True):
                axes.text(at, height + 0.01, f"{100 * height:.1f}", ha="center", fontsize=8)
        axes.axhline(self.chance, color=COLOURS[1], linewidth=1, linestyle=":", label="most frequent class")
        names = [f"{row['protocol']}\n{row['labels']:,} labels" for row in self.rows]
        axes.set_xticks(place, names, fontsize=8)
        axes.set(ylabel="accuracy", ylim=(0, 1.2), yticks=np.linspace(0, 1, 6).tolist())
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


class ImageNetProtocol(Estimator):
    """Runs the parts of the protocol on an encoder and on the same network with random weights.

    Neighbours and heads leave the encoder frozen, in evaluation mode; fine-tuning trains a copy of all of it. Labels of
    fine-tuning are as many of each class: a share of the mean number, at least one, and all that a class has where that
    is less. The smaller part lies inside the larger one. All parts train at the rate of the `batch_size`, also one
    that is smaller than a batch and therefore seen whole in each step. Modules, weights and buffers stay as they were.

    Args:
        k: neighbours, at least 1; of fewer samples, all.
        temperature: of their votes, above 0.
        rates: of the heads, for 256 samples, above 0; empty leaves the heads out.
        epochs: of the heads, at least 1.
        momentum: of their SGD, in [0, 1).
        normalised: whether they have MAE's batch norm before them, which features of unlike scales need.
        held_out: share of each class by which the rate is chosen, in (0, 1); at least one where a class has two.
        shares: of the labels that fine-tuning gets, in (0, 1], each once; empty leaves it out.
        tuning_epochs: one number for each share, at least 1.
        optimizer: of fine-tuning, with the rate for 256 samples; None is SimCLR's.
        groups: of fine-tuning, such as `layer_decay`, 0.65 (MAE's code, ViT-B) or 0.75 (its paper) for transformers.
        warmup: of fine-tuning, a share of its steps in [0, 1).
        seed: of the parts, orders and augmentations, at least 0.
    """

    def __init__(
        self,
        k: int = 20,
        temperature: float = 0.07,
        rates: Sequence[float] = RATES,
        epochs: int = 100,
        momentum: float = 0.9,
        normalised: bool = False,
        held_out: float = 0.1,
        shares: Sequence[float] = (0.01, 0.1),
        tuning_epochs: Sequence[int] = (60, 30),
        optimizer: OptimizerCallable | None = None,
        groups: ParameterGroups | None = None,
        warmup: float = 0.0,
        seed: int = 0,
    ) -> None:
        checked: tuple[tuple[str, dict[str, float | Sequence[float]]], ...] = (
            ("[1, inf)", {"k": k, "epochs": epochs, "tuning_epochs": tuning_epochs}),
            ("(0, inf)", {"temperature": temperature, "rates": rates}),
            ("[0, 1)", {"momentum": momentum, "warmup": warmup}),
            ("(0, 1)", {"held_out": held_out}),
            ("(0, 1]", {"shares": shares}),
            ("[0, inf)", {"seed": seed}),
        )
        for interval, settings in checked:
            require_in(interval, **{f"ImageNetProtocol {name}": value for name, value in settings.items()})
        if len(tuning_epochs) != len(shares) or len({*shares}) != len(shares):
            raise UserError(
                f"ImageNetProtocol shares={[*shares]} must be different ones, and as many as "
                f"tuning_epochs={[*tuning_epochs]}"
            )
        self.k, self.temperature, self.rates, self.epochs = k, temperature, tuple(rates), epochs
        self.momentum, self.normalised, self.held_out = momentum, normalised, held_out
        self.parts = tuple(zip(shares, tuning_epochs, strict=True))
        self.optimizer, self.groups, self.warmup, self.seed = optimizer or SIMCLR, groups, warmup, seed

    def fit(self, subject: ProtocolSubject) -> ProtocolScores:
        """Raises: UserError for features that are not finite, samples without classes or with fewer than two, in
        training and one to score, and batches of one sample.
        """
        bank, query = subject.encoder.bank, subject.encoder.query
        known_N, asked_M = bank.classes(), query.classes()
        require_few_classes("the protocol", known_N)
        if subject.batch_size < 2:
            raise UserError(
                f"the protocol trains with batch_size={subject.batch_size}, and batch norm needs two samples; raise it "
                "in the data"
            )
        if len(known_N.unique()) < 2 or not len(asked_M):
            raise UserError(
                f"the protocol needs training samples of two classes and one to score, and has {len(known_N.unique())} "
                f"classes and {len(asked_M)} samples; give more"
            )
        both = subject.encoder, subject.floor
        rows = [self._row(NEIGHBOURS, [self._neighbours(one, known_N) for one in both], asked_M, known_N)]
        chosen, rates = [0, 0], tuple[dict[str, float], ...]()
        devices = [subject.device] if subject.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            if self.rates:
                held_N = self._held(known_N)
                heads = [self._heads(subject, one, known_N, held_N) for one in both]
                by_rate = [self._by_rate(*one, asked_M, known_N, held_N) for one in zip(heads, both, strict=True)]
                chosen = [int(torch.tensor([held for held, _ in one]).argmax()) for one in by_rate]
                chosen_heads = zip(heads, both, chosen, strict=True)
                predicted = [answers(logits(made, judged)[at]) for made, judged, at in chosen_heads]
                rows.append(self._row(LINEAR, predicted, asked_M, known_N[~held_N]))
                rates = tuple(
                    {"rate": rate, "held_out": mine[0], "accuracy": mine[1], "floor": floor[1]}
                    for rate, mine, floor in zip(self.rates, *by_rate, strict=True)
                )
            for share, epochs in self.parts:
                rows.append(self._few_labels(subject, share, epochs, known_N, asked_M))
        rate, floor_rate = (self.rates[at] if self.rates else 0.0 for at in chosen)
        chance = float((asked_M == known_N.bincount().argmax()).double().mean())
        counts = len(known_N.unique()), len(known_N), len(asked_M)
        return ProtocolScores(tuple(rows), rates, rate, floor_rate, chance, *counts)

    def _neighbours(self, judged: Judged, known_N: Tensor) -> Tensor:
        bank_ND, query_MD = judged.bank.rows(), judged.query.rows()
        return knn_classes(bank_ND, known_N, query_MD, min(self.k, len(bank_ND)), self.temperature)

    def _held(self, known_N: Tensor) -> Tensor:
        """Which training samples choose the rate: bool [N]."""
        held_N = torch.zeros(len(known_N), dtype=torch.bool)
        for label in known_N.unique():
            own = (known_N == label).nonzero()[:, 0]
            count = min(max(1, round(self.held_out * len(own))), len(own) - 1)
            mixed = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed))]
            held_N[mixed[:count]] = True
        return held_N

    def _heads(self, subject: ProtocolSubject, judged: Judged, known_N: Tensor, held_N: Tensor) -> LinearHeads:
        torch.manual_seed(self.seed)
        rows_P = (~held_N).nonzero()[:, 0]
        return fit_linear_heads(
            lambda x: subject.features(judged.network, judged, x),
            subject.batches(rows_P, self.epochs, self.seed),
            subject.steps(len(rows_P), self.epochs),
            subject.batch_size,
            self.rates,
            1 + int(known_N.max()),
            self.momentum,
            self.normalised,
        ).cpu()

    def _by_rate(
        self, heads: LinearHeads, judged: Judged, asked_M: Tensor, known_N: Tensor, held_N: Tensor
    ) -> list[tuple[float, float]]:
        """(accuracy on samples that are held out, on those that are scored) of each head. Where no class has two
        samples, those that trained choose.
        """
        judging_N = held_N if held_N.any() else ~held_N
        with torch.no_grad():
            held_RPK = heads(judged.bank.rows()[judging_N].float())
        sides = (held_RPK, known_N[judging_N]), (logits(heads, judged), asked_M)
        held, scored = ([float((answers(one) == label).double().mean()) for one in on] for on, label in sides)
        return list(zip(held, scored, strict=True))

    def _few_labels(
        self, subject: ProtocolSubject, share: float, epochs: int, known_N: Tensor, asked_M: Tensor
    ) -> dict[str, Any]:
        each = max(1, round(share * len(known_N) / len(known_N.unique())))
        rows_P = torch.from_numpy(balanced_part(known_N.numpy(), each, self.seed))
        predicted = []
        for judged in (subject.encoder, subject.floor):
            torch.manual_seed(self.seed)
            found_MK = fine_tuned(
                subject,
                judged,
                subject.batches(rows_P, epochs, self.seed),
                subject.steps(len(rows_P), epochs),
                subject.batch_size,
                1 + int(known_N.max()),
                self.optimizer,
                self.groups,
                self.warmup,
            )
            predicted.append(answers(found_MK))
        return self._row(f"fine-tuned on {100 * share:g} %", predicted, asked_M, known_N[rows_P])

    def _row(self, protocol: str, predicted: Sequence[Tensor], asked_M: Tensor, known_P: Tensor) -> dict[str, Any]:
        right_M, floor_M = ((one == asked_M).double() for one in predicted)
        gain_M, of_class = right_M - floor_M, known_P.bincount()[known_P.unique()]
        return {
            "protocol": protocol,
            "labels": len(known_P),
            "fewest": int(of_class.min()),
            "most": int(of_class.max()),
            "accuracy": float(right_M.mean()),
            "floor": float(floor_M.mean()),
            "gain": float(gain_M.mean()),
            "interval": half_interval(gain_M),
        }


@torch.no_grad()
def logits(heads: LinearHeads, judged: Judged) -> Tensor:
    """Of the evaluation samples, [R M K]."""
    return heads(judged.query.rows().float())


def answers(logits_MK: Tensor) -> Tensor:
    """The class with the largest score, [M]; -1, which is never right, where scores are not finite."""
    return torch.where(logits_MK.isfinite().all(dim=1), logits_MK.argmax(dim=1), -1)
