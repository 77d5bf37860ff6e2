"""The report on task vectors before they are merged."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.merging import interference
from lightspan.merging.merger import require_alike
from lightspan.merging.weights import Weights
from lightspan.results import Figure, Result

BASE = "base"


@dataclass(frozen=True)
class InterferenceReport(Result):
    """See `lightspan.merging.interference`; shares are in [0, 1].

    Attributes:
        sign_conflicts: over all entries that at least two vectors change.
        cosine: mean over tensors, weighted by their entries, as all means here.
        overlap_outputs, overlap_inputs, floor_outputs, floor_inputs: means over the matrices that have subspaces.
        layers: name -> entries, length_TASK (relative), cosine, sign_conflicts and, of matrices, the four above.
    """

    tasks: tuple[str, ...]
    sign_conflicts: float
    cosine: float
    overlap_outputs: float
    floor_outputs: float
    overlap_inputs: float
    floor_inputs: float
    relative_length: float
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("sign conflicts", 100 * self.sign_conflicts, "%"),
            Figure("cosine of pairs", self.cosine),
            Figure("overlap of output subspaces", self.overlap_outputs),
            Figure("95 % of random ones below", self.floor_outputs),
            Figure("overlap of input subspaces", self.overlap_inputs),
            Figure("95 % of random ones below ", self.floor_inputs),
            Figure("length over the base's", self.relative_length),
            Figure("tensors", len(self.layers)),
        )

    def draw(self, axes: Any) -> None:
        rows = list(self.layers.values())
        at = range(len(rows))
        axes.plot(
            at, [row["sign_conflicts"] for row in rows], "-o", color="#1f5fd0", markersize=3, label="sign conflicts"
        )
        matrices = [i for i in at if "overlap_outputs" in rows[i]]
        for side, colour in (("outputs", "#d1560f"), ("inputs", "#2b8a3e")):
            values = [rows[i][f"overlap_{side}"] for i in matrices]
            floors = [rows[i][f"floor_{side}"] for i in matrices]
            axes.plot(matrices, values, "s", color=colour, markersize=4, label=f"overlap, {side}")
            axes.plot(matrices, floors, "_", color=colour, markersize=9, label=f"random, {side}")
        axes.set(xlabel="tensor", ylabel="share", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=7)


class Interference(Estimator):
    """How much the changes of models trained from one base are in each other's way. Inputs: `base`, and two or more
    models under names of your choice. In memory are one tensor of each and its decomposition.

    Args:
        rank: singular directions that make a subspace; fewer where half a matrix has fewer.
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
        layers: dict[str, dict[str, float]] = {}
        weighted: dict[str, float] = defaultdict(float)
        counted: dict[str, float] = defaultdict(float)
        floor = cache(interference.floor)
        for name, form in base.forms.items():
            if not form.dtype.is_floating_point or not form.numbers or name in base.aliases:
                continue
            base_S = base.read(name)
            read = {task: weights.read(name) for task, weights in models.items()}
            for source, tensor in ((BASE, base_S), *read.items()):
                if not tensor.isfinite().all():
                    raise UserError(f"{name} of {source} holds NaN or infinity; look at the run that it comes from")
            taus = interference.vectors_of(base_S, list(read.values()))
            shared, split = interference.sign_conflicts(taus, self.density)
            lengths = interference.relative_lengths(base_S, taus)
            row = {f"length_{task}": length for task, length in zip(models, lengths, strict=True)}
            row |= {"entries": form.numbers, "cosine": interference.mean_cosine(taus)}
            row["sign_conflicts"] = split / max(1, shared)
            frames = [interference.directions(tau, self.rank) for tau in taus]
            if all(pair is not None for pair in frames):
                for side, which in (("outputs", 0), ("inputs", 1)):
                    own = [pair[which] for pair in frames if pair is not None]
                    row[f"overlap_{side}"] = interference.overlap(own)
                    row[f"floor_{side}"] = floor(*own[0].shape, len(own))
            layers[name] = row
            weighted["sign_conflicts"] += split
            counted["sign_conflicts"] += shared
            for key in ("cosine", *(k for k in row if k.startswith(("overlap_", "floor_")))):
                weighted[key] += form.numbers * row[key]
                counted[key] += form.numbers
            weighted["relative_length"] += form.numbers * sum(lengths) / len(lengths)
            counted["relative_length"] += form.numbers
        if not layers:
            raise UserError("Interference found no tensor with numbers to compare; name checkpoints of a network")
        means = {
            name: weighted[name] / max(1.0, counted[name])
            for name in InterferenceReport.__dataclass_fields__
            if name not in ("tasks", "layers", "tensors")
        }
        return InterferenceReport(tuple(models), layers=layers, **means)  # type: ignore[arg-type]  # the fields above
