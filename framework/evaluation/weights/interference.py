"""The report on task vectors before they are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.merging import interference
from lightspan.merging.merger import require_alike
from lightspan.merging.models import BASE
from lightspan.merging.weights import Weights

SIDES = ("outputs", "inputs")


@dataclass(frozen=True)
class InterferenceReport(Result):
    """See `lightspan.merging.interference`; shares are in [0, 1]. None is what is not defined: conflicts where no entry
    is changed twice, the cosine beside a vector of zeros, an overlap where fewer than two models change the matrix, a
    length beside a base of zeros.

    Attributes:
        sign_conflicts: over all entries that at least two vectors change.
        cosine: mean over tensors, weighted by their entries, as all means here, where it is defined.
        overlap_outputs, overlap_inputs, floor_outputs, floor_inputs: means over the matrices that at least two models
            change.
        layers: name -> entries, length_TASK (relative), cosine, sign_conflicts, the rank of the subspaces compared, and
            the four above.
    """

    tasks: tuple[str, ...]
    sign_conflicts: float | None
    cosine: float | None
    overlap_outputs: float | None
    floor_outputs: float | None
    overlap_inputs: float | None
    floor_inputs: float | None
    relative_length: float | None
    layers: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def figures(self) -> tuple[Figure, ...]:
        """Without those that are not defined."""
        shares = (
            ("overlap of output subspaces", self.overlap_outputs),
            ("95 % of random output ones below", self.floor_outputs),
            ("overlap of input subspaces", self.overlap_inputs),
            ("95 % of random input ones below", self.floor_inputs),
            ("cosine of pairs", self.cosine),
            ("length over the base's", self.relative_length),
        )
        conflicts = () if self.sign_conflicts is None else (Figure("sign conflicts", 100 * self.sign_conflicts, "%"),)
        compared = sum(row["rank"] is not None for row in self.layers.values())
        return (
            *conflicts,
            *(Figure(name, value) for name, value in shares if value is not None),
            Figure("matrices compared", compared),
            Figure("tensors", len(self.layers)),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        """One row a tensor, with the number that it has in the picture; empty where nothing is defined."""
        return tuple(
            {"number": i, "tensor": name} | {key: "" if value is None else value for key, value in row.items()}
            for i, (name, row) in enumerate(self.layers.items())
        )

    def draw(self, axes: Any) -> None:
        rows = list(self.layers.values())
        series = [("sign_conflicts", "o", COLOURS[0], "sign conflicts")]
        for side, colour in zip(SIDES, COLOURS[1:], strict=False):
            series += [(f"overlap_{side}", "s", colour, f"overlap of {side}")]
            series += [(f"floor_{side}", "_", colour, f"95 % of random {side} below")]
        for key, marker, colour, label in series:
            if at := [i for i, row in enumerate(rows) if row[key] is not None]:
                axes.plot(at, [rows[i][key] for i in at], marker, color=colour, markersize=4, label=label)
        axes.set(xlabel="number of the tensor in table.csv", ylabel="share", ylim=(-0.02, 1.02))
        if axes.lines:
            axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


class Interference(Estimator):
    """How much the changes of models trained from one base are in each other's way. Inputs: `base`, and two or more
    models under names of your choice. In memory are one tensor of each and its decomposition.

    Args:
        rank: singular directions that make a subspace; fewer where half a matrix has fewer, or the change of it.
            A model that does not change a matrix is left out there.
        density: share of each vector's entries that count for sign conflicts, in (0, 1].
    """

    def __init__(self, rank: int = 8, density: float = 0.2) -> None:
        if rank < 1:
            raise UserError(f"Interference rank={rank} must be at least 1")
        if not 0 < density <= 1:
            raise UserError(f"Interference density={density} must be above 0 and at most 1")
        self.rank, self.density = rank, density

    def fit(self, base: Weights, **models: Weights) -> InterferenceReport:
        """Tensors without entries, or without fractions, say nothing. Raises: UserError for fewer than two models, for
        checkpoints of different models, and numbers that are not finite, by name.
        """
        if len(models) < 2:
            raise UserError(f"Interference compares two models or more beside base, and got {len(models)}; name them")
        require_alike({BASE: base, **models})
        layers: dict[str, dict[str, float | None]] = {}
        conflicts = [0, 0]
        floor = cache(interference.floor)
        for name, form in base.forms.items():
            if not form.dtype.is_floating_point or not form.numbers or name in base.aliases:
                continue
            base_S = base.read(name)
            read = {task: weights.read(name) for task, weights in models.items()}
            for source, tensor in ((BASE, base_S), *read.items()):
                if not tensor.double().isfinite().all():
                    raise UserError(f"{name} of {source} holds NaN or infinity; look at the run that it comes from")
            taus = interference.vectors_of(base_S, list(read.values()))
            shared, split = interference.sign_conflicts(taus, self.density)
            conflicts = [conflicts[0] + shared, conflicts[1] + split]
            lengths = interference.relative_lengths(base_S, taus)
            row: dict[str, float | None] = {"entries": form.numbers}
            row |= {f"length_{task}": lengths[i] if lengths else None for i, task in enumerate(models)}
            row |= {"cosine": interference.mean_cosine(taus), "sign_conflicts": split / shared if shared else None}
            noise = [interference.rounding(model_S) for model_S in read.values()]
            found = [interference.directions(tau, self.rank, at) for tau, at in zip(taus, noise, strict=True)]
            frames = [pair for pair in found if pair is not None]
            rank = min(left.shape[1] for left, _ in frames) if len(frames) > 1 else None
            row["rank"] = rank
            for side, frames_NR in zip(SIDES, zip(*frames, strict=True) if rank else ((), ()), strict=True):
                own = [frame_NR[:, :rank] for frame_NR in frames_NR]
                row[f"overlap_{side}"] = interference.overlap(own) if own else None
                row[f"floor_{side}"] = floor(*own[0].shape, len(own)) if own else None
            layers[name] = row
        if not layers:
            raise UserError("Interference found no tensor with numbers to compare; name checkpoints of a network")
        rows = list(layers.values())
        lengths_of = [mean for task in models if (mean := _mean(rows, f"length_{task}")) is not None]
        return InterferenceReport(
            tasks=tuple(models),
            sign_conflicts=conflicts[1] / conflicts[0] if conflicts[0] else None,
            cosine=_mean(rows, "cosine"),
            overlap_outputs=_mean(rows, "overlap_outputs"),
            floor_outputs=_mean(rows, "floor_outputs"),
            overlap_inputs=_mean(rows, "overlap_inputs"),
            floor_inputs=_mean(rows, "floor_inputs"),
            relative_length=sum(lengths_of) / len(lengths_of) if lengths_of else None,
            layers=layers,
        )


def _mean(rows: Sequence[Mapping[str, float | None]], key: str) -> float | None:
    """Weighted by entries, over the tensors where it is defined."""
    known = [(n, x) for row in rows if (n := row["entries"]) is not None and (x := row[key]) is not None]
    return sum(n * x for n, x in known) / sum(n for n, _ in known) if known else None
