"""Which training samples a run sees, and how often: a small file that any data module takes as its `selection`.

Shapes: N samples of the data, n of them selected, G groups of a mixture.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path, expanded
from lightspan.core.files.places import PathUse, ReadPath
from lightspan.core.files.runs import TENSORS
from lightspan.core.files.tensors import Form, facts_of, stored_tensors, write_tensors
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.subset import SubsetOfBatches, SubsetSamples, known_labels
from lightspan.datamodules.loading.workers import BatchDataset, Dataset

FORMAT = "lightspan selection 1"
SUM = 1e-6
"""How far the shares of a mixture may be from a sum of 1."""
LOOKED_AT = 8
SHOWN = 20
"""Groups of a mixture that are listed."""
_COLUMNS = {"index": torch.int64, "weight": torch.float64, "group": torch.int64, "mixture": torch.float64}
_ANEW = "select again, with `lightspan run selection/...`"


def data_name(dataset: Dataset, order: Order | None) -> str:
    """32 hexadecimal digits of training samples, by which a selection knows them again.

    They follow from what the data say of their content, the number of samples and, where these are known, their labels;
    for data that tell neither content nor labels from some samples, as training gets them with a fixed seed. How
    samples are decoded, mixed and divided into batches does not count where their content is known.
    """
    digest = hashlib.sha256(f"{len(dataset)} {order.content if order else ''} ".encode())
    if (labels := known_labels(dataset)) is not None:
        digest.update(np.asarray(labels).astype("<i8").tobytes())
    elif not (order and order.content) and len(dataset):
        for place in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).round().astype(int)).tolist():
            for name, value in sorted(dataset.sample(place, 0).items()):
                held = isinstance(value, Tensor)
                content = value.reshape(-1).view(torch.uint8).numpy().tobytes() if held else repr(value).encode()
                digest.update(name.encode() + content)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class DataSelection:
    """Samples of a data set that are trained on, or how often each is. One of three kinds:

    - samples: `index_n` alone; an epoch sees each once.
    - weights: with `weight_n`; an epoch has as many places as there are samples of a weight above 0, and each comes in
      proportion to its weight, see `lightspan.datamodules.loading.order.Weighted`.
    - a mixture: `mixture_G` over groups, such as clusters, domains or tars; the samples of a group share its part of an
      epoch evenly. A group of share 0 is left out.

    Attributes:
        count: N of the data that it was made for.
        data: their `data_name`.
        rule: how it was chosen, in a few words, for people.
        index_n: places among the training samples, int64 [n], ascending and distinct; None is all.
        weight_n: float64 [n], at least 0, finite, and not all 0.
        group_N: the group of each sample, int64 [N], counted from 0; for a mixture without, the groups are the blocks
            in which the data come: tars, in the order in which a recipe names them.
        mixture_G: float64 [G], at least 0, with a sum of 1.
    Whole numbers of other widths become int64, and all weights and shares float64, as the file has them.
    Raises: UserError for numbers out of these ranges, and for places and groups that are no whole numbers: fractions
        would be cut off, and masks mean something else.
    """

    count: int
    data: str
    rule: str
    index_n: np.ndarray | None = None
    weight_n: np.ndarray | None = None
    group_N: np.ndarray | None = None
    mixture_G: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"a selection of count={self.count} samples must be of at least 1")
        for name, column in (("index_n", self.index_n), ("group_N", self.group_N)):
            if column is not None:
                object.__setattr__(self, name, _whole(name, column))
        for name, column in (("weight_n", self.weight_n), ("mixture_G", self.mixture_G)):
            if column is not None:
                object.__setattr__(self, name, np.asarray(column, np.float64))
        if self.mixture_G is None:
            if self.index_n is None and self.weight_n is None:
                raise UserError("a selection needs an index, a weight or a mixture")
            if self.group_N is not None:
                raise UserError("a selection has a group for each sample, but no mixture over them")
            self._require_index()
            self._require_weights()
        else:
            if self.index_n is not None or self.weight_n is not None:
                raise UserError("a selection is of samples with or without weights, or a mixture, not both")
            self._require_mixture(self.mixture_G)

    def _require_index(self) -> None:
        index_n = self.index_n
        if index_n is None:
            return
        if not len(index_n):
            raise UserError("a selection needs at least one sample in its index")
        if len(index_n) > self.count:
            raise UserError(
                f"a selection has an index of {len(index_n):,} rows, more than the {self.count:,} of the data"
            )
        if index_n[0] < 0 or index_n[-1] >= self.count or (np.diff(index_n) < 1).any():
            raise UserError(
                f"the index of a selection must be distinct and ascending in [0, {self.count}), the samples of the data"
            )

    def _require_weights(self) -> None:
        weight_n = self.weight_n
        if weight_n is None:
            return
        rows = self.count if self.index_n is None else len(self.index_n)
        if len(weight_n) != rows:
            raise UserError(
                f"a selection has {len(weight_n):,} numbers as weight for {rows:,} samples; give one for each"
            )
        _require_above("weight", weight_n)

    def _require_mixture(self, mixture_G: np.ndarray) -> None:
        _require_above("mixture", mixture_G)
        if abs(float(mixture_G.sum()) - 1) > SUM:
            raise UserError(
                f"the mixture of a selection has a sum of {mixture_G.sum():.9g}; its shares must add up to 1"
            )
        if self.group_N is None:
            return
        if len(self.group_N) != self.count:
            raise UserError(f"a selection has a group for {len(self.group_N):,} samples, but is of {self.count:,}")
        if self.group_N.min() < 0 or self.group_N.max() >= len(mixture_G):
            raise UserError(f"the group of each sample must lie in [0, {len(mixture_G)}), the groups of the mixture")
        _require_members(mixture_G, np.bincount(self.group_N, minlength=len(mixture_G)))

    @property
    def kind(self) -> str:
        """ "samples", "weights" or "a mixture"."""
        if self.mixture_G is not None:
            return "a mixture"
        return "samples" if self.weight_n is None else "weights"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of what it selects."""
        content = hashlib.sha256()
        for name, column in self.columns().items():
            content.update(name.encode() + column.numpy().tobytes())
        return content.hexdigest()[:16]

    def columns(self) -> dict[str, Tensor]:
        """What its file holds, by name."""
        arrays = {"index": self.index_n, "weight": self.weight_n, "group": self.group_N, "mixture": self.mixture_G}
        return {n: torch.from_numpy(np.ascontiguousarray(x)) for n, x in arrays.items() if x is not None}

    def facts(self) -> dict[str, str]:
        """The metadata of its file."""
        return {"selection": FORMAT, "count": str(self.count), "data": self.data, "rule": self.rule}

    def write(self, path: Annotated[Path, PathUse.RUN]) -> None:
        """A safetensors file, whole or not at all; equal selections are equal bytes."""
        columns = self.columns()
        forms = {name: Form(tuple(column.shape), column.dtype) for name, column in columns.items()}
        with atomic_path(path) as temporary:
            write_tensors(temporary, forms, columns.items(), {"format": "pt", **self.facts()})

    @classmethod
    def read(cls, path: ReadPath | Path) -> "DataSelection":
        """From its file, or the folder of a run that selected. Raises: UserError for anything else."""
        place = expanded(path, "data.init_args.selection")
        place = place / TENSORS if place.is_dir() else place
        if not place.exists():
            raise UserError(f"there is no selection at {place}; `lightspan run selection/...` writes one")
        columns, metadata = stored_tensors(place, _ANEW)
        if metadata.get("selection") != FORMAT:
            raise UserError(f"{place} is no selection of samples ({FORMAT!r} is not in its metadata); {_ANEW}")
        facts = facts_of(metadata, place, count=int, data=str, rule=str)
        for name, dtype in _COLUMNS.items():
            column = columns.get(name)
            if column is not None and (column.ndim != 1 or column.dtype != dtype):
                raise UserError(f"{place} has {name} as {column.dtype} {list(column.shape)}, not {dtype} [n]; {_ANEW}")
        index, weight, group, mixture = (_array(columns, name) for name in _COLUMNS)
        try:
            return cls(facts["count"], facts["data"], facts["rule"], index, weight, group, mixture)
        except UserError as error:
            raise UserError(f"{place}: {error}; {_ANEW}") from error

    def described(self) -> dict[str, str]:
        """What it is, for people, by name."""
        known = {"selects": self.kind, "by": self.rule, "of training samples": f"{self.count:,}", "data": self.data}
        if self.index_n is not None:
            known["samples"] = f"{len(self.index_n):,}"
        if self.weight_n is not None:
            share_n = self.weight_n / self.weight_n.max()  # sums of the largest numbers leave their range
            places_n = share_n / share_n[self.weight_n > 0].mean()
            marks = ("least", 0), ("median", 0.5), ("most", 1)
            known["places in an epoch"] = ", ".join(f"{name} {np.quantile(places_n, at):.4g}" for name, at in marks)
        if self.mixture_G is not None:
            known["groups"] = f"{len(self.mixture_G)}" + ", blocks of the data" * (self.group_N is None)
            if self.group_N is not None:
                sizes = np.bincount(self.group_N, minlength=len(self.mixture_G))
                known["samples of groups"] = _first_of([f"{size:,}" for size in sizes])
            known["shares of groups"] = _first_of([f"{share:.4g}" for share in self.mixture_G])
        return known

    def require_data(self, dataset: Dataset, order: Order | None) -> None:
        """Raises: UserError for other data than those that it was made for."""
        if len(dataset) != self.count:
            raise UserError(
                f"the selection is of {self.count:,} training samples, and these data have {len(dataset):,}; {_ANEW}"
            )
        if (found := data_name(dataset, order)) != self.data:
            raise UserError(
                f"the selection was made of other data: it names them {self.data}, and these are {found}, by their "
                f"content and labels; {_ANEW} on these, or give the data that it is of"
            )

    def taken(self, dataset: Dataset, order: Order | None) -> tuple[SubsetSamples, Order]:
        """The samples that are seen, and their order. Raises: UserError as `require_data`; for a mixture over other
        blocks than the data have; for weights where the data have an order that goes by class or task.
        """
        self.require_data(dataset, order)
        order = order or Order((len(dataset),))
        weight_N, group_N = self.expanded(order.sizes)
        chosen = np.flatnonzero(weight_N)
        kind = SubsetOfBatches if isinstance(dataset, BatchDataset) else SubsetSamples
        part = order.of_part(chosen, self.digest)
        if self.kind != "samples":
            part = part.weighted(weight_N[chosen], group_N[chosen])
        return kind(dataset, chosen), part

    def expanded(self, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(weight, group) of each sample, float64 and int64 [N]; those that are left out have weight 0.

        Args:
            sizes: of the blocks of the data.
        Raises: UserError for a mixture over other blocks.
        """
        if self.mixture_G is None:
            weight_N = np.zeros(self.count)
            given = 1.0 if self.weight_n is None else self.weight_n / self.weight_n.max()
            weight_N[slice(None) if self.index_n is None else self.index_n] = given
            return weight_N, np.zeros(self.count, np.int64)
        group_N = self.group_N
        if group_N is None:
            if len(sizes) != len(self.mixture_G):
                raise UserError(
                    f"the selection mixes {len(self.mixture_G)} blocks, and these data come in {len(sizes)}; "
                    "give the tars of which it is a mixture"
                )
            group_N = np.repeat(np.arange(len(sizes)), sizes)
        members_G = np.bincount(group_N, minlength=len(self.mixture_G))
        _require_members(self.mixture_G, members_G)
        return (self.mixture_G / np.maximum(members_G, 1))[group_N], group_N


def _first_of(words: list[str]) -> str:
    return ", ".join(words[:SHOWN]) + f", and {len(words) - SHOWN} more" * (len(words) > SHOWN)


def _array(columns: Mapping[str, Tensor], name: str) -> np.ndarray | None:
    return columns[name].numpy() if name in columns else None


def _whole(name: str, numbers: np.ndarray) -> np.ndarray:
    """As int64."""
    if not np.issubdtype(numbers.dtype, np.integer):
        way_out = (
            "np.flatnonzero of a mask" if numbers.dtype == bool else "numbers.astype(np.int64), once they are whole"
        )
        raise UserError(f"{name} of a selection is {numbers.dtype}, and must be whole numbers, int64; give {way_out}")
    return numbers.astype(np.int64)


def _require_above(name: str, numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all() or (numbers < 0).any():
        wrong = numbers[~(np.isfinite(numbers) & (numbers >= 0))][0]
        raise UserError(f"the {name} of a selection has {wrong}; each must be finite and at least 0")
    if not numbers.any():
        raise UserError(f"the {name} of a selection is 0 everywhere, which leaves nothing to train on")


def _require_members(mixture_G: np.ndarray, members_G: np.ndarray) -> None:
    if len(empty := np.flatnonzero((mixture_G > 0) & (members_G == 0))):
        raise UserError(f"group {empty[0]} has a share of {mixture_G[empty[0]]:.4g} in the mixture, but no sample")
