"""What a selector gives, and for which data: the result that `lightspan run` writes, and the data that it names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lightning import LightningDataModule

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.selection import DataSelection, data_name
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore

PLACES = 101
"""Of a curve that is drawn."""


@dataclass(frozen=True)
class NamedSamples:
    """Training samples that a selection is of. `name` is their `lightspan.datamodules.loading.selection.data_name`, and
    `sizes` are those of their blocks, such as tars.
    """

    count: int
    name: str
    sizes: tuple[int, ...]

    def places(self, features: Features) -> np.ndarray:
        """Where the rows of features lie among these samples, int64 [n]: those of a split "bank".

        Raises: UserError for features of none of them, or without an index and not of all.
        """
        if features.index_N is None:
            if len(features) != self.count:
                raise UserError(
                    f"features of {len(features):,} rows have no index, and the data have {self.count:,} training "
                    "samples; give the features of all, or an index for each"
                )
            return np.arange(self.count)
        index_n = features.index_N.numpy()
        if not len(index_n) or index_n[0] < 0 or index_n[-1] >= self.count or (np.diff(index_n) < 1).any():
            raise UserError(
                f"the index of the {len(index_n):,} features must be distinct and ascending in [0, {self.count}), the "
                "training samples of the data; take the features of the split `bank` of the same data"
            )
        return index_n


class TrainingSamples(Input):
    """The training samples of a data module, as it gives them to a run: what a selection is of.

    Args:
        data: as in the recipe that is to train on the selection.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self.data = data

    def load(self, store: FeatureStore) -> NamedSamples:
        """Raises: UserError for data that have a selection, or that no loader of lightspan loads."""
        if getattr(self.data, "selection", None) is not None:
            raise UserError("the data of a selector have a selection themselves; leave selection out of them")
        self.data.prepare_data()
        self.data.setup("fit")
        loader = self.data.train_dataloader()
        order = getattr(loader, "order", None)
        if not isinstance(order, Order):
            raise UserError(
                f"{type(self.data).__name__} loads its training samples by {type(loader).__name__}, which takes no "
                "selection; return `train_loader(...)` of lightspan.datamodules.loading.ranks from train_dataloader()"
            )
        return NamedSamples(len(loader.dataset), data_name(loader.dataset, order), order.sizes)

    def outlook(self, store: FeatureStore) -> str:
        found = self.load(store)
        return f"{found.count:,} training samples, {found.name}"


@dataclass(frozen=True)
class SelectedData(Result):
    """A selection, with what was measured of it. Its `tensors` are the file that data modules take.

    Attributes:
        measured: figures of the selector by name, the most important one first.
        effective: (sum w)^2 / (sum w^2) over samples of their places in an epoch: how many of equal weight would be as
            uneven.
        heaviest: places of an epoch that one sample takes, at most.
        curve: places of an epoch that a sample takes, from the fewest to the most, at evenly spaced shares of the
            selected samples; empty with groups.
        shares: of each group in an epoch; `natural`: its share of the samples. Empty without groups.
    """

    kind: str
    rule: str
    data: str
    count: int
    kept: int
    effective: float
    heaviest: float
    measured: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    natural: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        selection: DataSelection,
        samples: NamedSamples,
        measured: Mapping[str, float],
        shown_N: np.ndarray | None = None,
    ) -> "SelectedData":
        """Of a selection for these samples.

        Args:
            shown_N: groups whose shares are worth a look, int64 [N], of what is no mixture.
        """
        weight_N, group_N = selection.expanded(samples.sizes)
        grouped = selection.mixture_G is not None or shown_N is not None
        group_N = group_N if shown_N is None else shown_N
        groups = int(group_N.max()) + 1 if selection.mixture_G is None else len(selection.mixture_G)
        share_G = np.bincount(group_N, weight_N, minlength=groups) / weight_N.sum()
        natural_G = np.bincount(group_N, minlength=groups) / selection.count
        kept = int(np.count_nonzero(weight_N))
        places_n = np.sort(weight_N[weight_N > 0]) * (kept / weight_N.sum())
        at = np.linspace(0, kept - 1, PLACES).round().astype(int)
        return cls(
            kind=selection.kind,
            rule=selection.rule,
            data=selection.data,
            count=selection.count,
            kept=kept,
            effective=float(places_n.sum() ** 2 / np.square(places_n).sum()),
            heaviest=float(places_n[-1]),
            measured={name: float(value) for name, value in measured.items()},
            curve=() if grouped else tuple(places_n[at].tolist()),
            shares=tuple(share_G.tolist()) if grouped else (),
            natural=tuple(natural_G.tolist()) if grouped else (),
            tensors=selection.columns(),
        )

    def selection(self) -> DataSelection:
        """What data modules take."""
        columns = {name: column.numpy() for name, column in self.tensors.items()}
        names = {"index": "index_n", "weight": "weight_n", "group": "group_N", "mixture": "mixture_G"}
        arrays = {names[name]: column for name, column in columns.items()}
        return DataSelection(self.count, self.data, self.rule, **arrays)

    def metadata(self) -> dict[str, str]:
        return self.selection().facts()

    def figures(self) -> tuple[Figure, ...]:
        return (
            *(Figure(name, value) for name, value in self.measured.items()),
            Figure("training samples", self.count),
            Figure("seen in an epoch", self.kept),
            Figure("effective sample size", self.effective),
            Figure("most places of one sample in an epoch", self.heaviest),
        )

    def draw(self, axes: Any) -> None:
        if self.shares:
            at = np.arange(len(self.shares))
            axes.bar(at - 0.2, self.natural, 0.4, color=SOFT, label="of the samples")
            axes.bar(at + 0.2, self.shares, 0.4, color=COLOURS[0], label="of an epoch")
            axes.set(xlabel="group", ylabel="share")
            axes.legend(frameon=False)
            return
        from matplotlib.ticker import LogLocator, NullLocator

        axes.plot(np.linspace(0, 100, len(self.curve)), self.curve, color=COLOURS[0])
        axes.set(xlabel="selected samples, %", ylabel="places in an epoch", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
