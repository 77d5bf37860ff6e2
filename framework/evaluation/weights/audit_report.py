"""The report of an audit of weights: a table with a row a tensor, and figures over all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightspan.core.results import Figure, Result
from lightspan.evaluation.weights.matrices import matrix_shape

SHARES = (0.90, 0.95, 0.99)
"""Of the energy, for which ranks are suggested."""
SIDES = ("rows", "columns")


@dataclass(frozen=True)
class AuditReport(Result):
    """Matrices and other tensors of a checkpoint, or of two.

    Attributes:
        a, b: paths; b is None for one checkpoint.
        rank: directions whose subspaces are compared, and the rank of the adapter that `kept` is of.
        layers: one mapping a tensor: name, kind, shape, notes, and, where they are defined, a, b and change (see
            `WeightAudit.measures`) and pair: relative (length of b - a over that of a), kept (share of the change's
            energy in its strongest `rank` directions), rank, rows and columns (angles in degrees, overlap, and what
            chance gives), intruders.
        ranks: {share: (least rank that keeps it of all changes together, or None)}, for two.
        only_a, only_b: names that the other one lacks.
    """

    a: str
    b: str | None
    rank: int
    layers: tuple[Mapping[str, Any], ...]
    ranks: Mapping[str, int | None]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def measured(self, part: str = "a") -> list[Mapping[str, Any]]:
        """The tensors that have this part."""
        return [row for row in self.layers if row.get(part) is not None]

    def figures(self) -> tuple[Figure, ...]:
        part = "a" if self.b is None else "change"
        what = "of A" if self.b is None else "of the change"
        rows = self.measured(part)
        above = [row[part]["above"] for row in rows if row[part]["above"] is not None]
        shares = [row[part]["effective_rank"] / row[part]["full"] for row in rows if row[part]["effective_rank"]]
        found = [Figure("matrices measured", len(self.measured()))]
        if self.b is not None:
            found.append(Figure("matrices changed", len(rows)))
            for share, rank in self.ranks.items():
                found += [] if rank is None else [Figure(f"rank for {share} % of the change", rank)]
            intruders = [row["pair"]["intruders"]["count"] for row in self.measured("pair") if row["pair"]["intruders"]]
            found += [Figure("intruder dimensions", sum(intruders))] if intruders else []
        if shares:
            found.append(Figure(f"effective rank {what}, mean share", 100 * sum(shares) / len(shares), "%"))
        found += [Figure(f"directions above noise {what}", sum(above))] if above else []
        found.append(Figure("tensors with a note", len([row for row in self.layers if row["notes"]])))
        return tuple(found)

    def table(self) -> tuple[dict[str, Any], ...]:
        """One row a tensor; empty where a number is not defined."""
        return tuple(_flat(row, self.b is not None) for row in self.layers)


def percent(share: float) -> str:
    return f"{100 * share:.0f}"


def shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _flat(row: Mapping[str, Any], pair: bool) -> dict[str, Any]:
    flat: dict[str, Any] = {"tensor": row["name"], "kind": row["kind"], "shape": shown(row["shape"])}
    flat["as_matrix"] = shown(matrix_shape(tuple(row["shape"])))
    for part in ("a", "b", "change") if pair else ("a",):
        own = row.get(part) or {}
        for key in ("rank", "effective_rank", "stable_rank", "above", "misfit"):
            flat[f"{part}_{key}"] = own.get(key)
        if part != "b":
            flat |= {f"{part}_rank_{percent(share)}": own.get("ranks", {}).get(percent(share)) for share in SHARES}
    if pair:
        both = row.get("pair") or {}
        flat |= {key: both.get(key) for key in ("relative", "kept")}
        for side in SIDES:
            own = both.get(side) or {}
            flat |= {f"{side}_{key}": own.get(key) for key in ("overlap", "overlap_mean", "overlap_floor")}
            flat[f"{side}_least_angle"] = own["angles"][0] if own else None
            flat[f"{side}_angle_floor"] = own.get("angle_floor")
        flat["intruders"] = (both.get("intruders") or {}).get("count")
    flat["notes"] = "; ".join(row["notes"])
    return {key: "" if value is None else value for key, value in flat.items()}
