"""What the weights of a checkpoint look like, matrix by matrix, and what another one changed of them.

Single numbers are computed in `lightspan.evaluation`: `spectra` (ranks), `noise_spectra` (what stands out of noise),
`random_subspaces` (what chance gives), `decomposition` (values and directions of large matrices). Intruder dimensions
are those of Shuttleworth, Andreas, Torralba, Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv
2410.21228, algorithm 1: of the strongest left singular vectors of the tuned matrix, those whose |cosine| with every one
of the base's is small.

Shapes: O rows, I columns, S singular values.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.devices import wide_type
from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.core.patterns import matches, require_matches
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.geometry.spectra import effective_rank, energy_rank, stable_rank
from lightspan.evaluation.weights.audit_report import SHARES, SIDES, AuditReport, percent, shown
from lightspan.evaluation.weights.decomposition import LARGEST, Decomposition
from lightspan.evaluation.weights.matrices import as_matrix, faults_of, kind_of
from lightspan.evaluation.weights.noise_spectra import fit_noise, values_of_noise
from lightspan.evaluation.weights.random_subspaces import angle_floor, cosine_ceiling, mean_overlap, overlap_floor
from lightspan.merging.interference import rounding
from lightspan.merging.weights import Weights
from lightspan.subspaces.grassmann import principal_angles

SHOWN = 48
"""Singular values of a matrix that a result keeps, evenly spaced on a logarithmic scale."""


class WeightAudit(Estimator):
    """Looks at each tensor of `a`, and if `b` is given at b's and at b - a. One tensor of each is in memory at a time.

    Args:
        rank: strongest directions whose subspaces are compared, fewer where half a matrix or its rank is less; and the
            rank of the adapter for `kept`.
        top: strongest directions of b among which intruders are counted; the paper takes 10.
        epsilon: |cosine| below which one is an intruder; 0.5 as in PEFT.
        largest: shorter side of a matrix up to which all singular values are computed; of larger ones the strongest 64
            alone are, with a bound on their error, and what needs all of them is left out.
        match: patterns of the names that are looked at.
    """

    def __init__(
        self,
        rank: int = 8,
        top: int = 10,
        epsilon: float = 0.5,
        largest: int = LARGEST,
        match: Sequence[str] = ("*",),
    ) -> None:
        for name, value in (("rank", rank), ("top", top), ("largest", largest)):
            if value < 1:
                raise UserError(f"WeightAudit {name}={value} must be at least 1")
        if not 0 < epsilon < 1:
            raise UserError(f"WeightAudit epsilon={epsilon} must be above 0 and below 1")
        self.rank, self.top, self.epsilon, self.largest, self.match = rank, top, epsilon, largest, match

    def fit(self, a: Weights, b: Weights | None = None) -> AuditReport:
        """Raises: UserError for checkpoints without numbers to look at, or two that share none."""
        return self.report(a, b, list(self.rows(a, b)))

    def names(self, a: Weights, b: Weights | None = None) -> list[str]:
        """What is looked at, in the order of a. Raises: UserError where there is nothing, or b has none of it."""
        if a.forms:
            require_matches(self.match, list(a.forms), f"tensor of {a.origin['path']}")
        names = [name for name, form in a.forms.items() if matches(name, self.match) and not _is_counter(form)]
        if not any(_is_readable(a.forms[name]) for name in names):
            raise UserError(
                f"{a.origin['path']} holds no tensor of floating-point numbers to look at, but "
                + (
                    ", ".join(f"{name} ({_named(form)})" for name, form in list(a.forms.items())[:3])
                    or "nothing at all"
                )
            )
        if b is not None and not any(name in b.forms for name in names):
            raise UserError(
                f"{a.origin['path']} and {b.origin['path']} have no tensor in common: the first has "
                f"{', '.join(names[:2])}, the other one {', '.join(list(b.forms)[:2]) or 'none'}; name two checkpoints "
                "of one network"
            )
        return names

    def rows(self, a: Weights, b: Weights | None = None) -> Iterator["AuditedRow"]:
        """One after the other, as they are computed, for a progress bar."""
        twins: dict[tuple[object, ...], str] = {}
        for name in self.names(a, b):
            yield self._row(name, a, b, twins)

    def report(self, a: Weights, b: Weights | None, rows: Sequence["AuditedRow"]) -> AuditReport:
        """The result of all of these rows."""
        names = [row.found["name"] for row in rows]
        changes = [row.change_S for row in rows if row.change_S is not None]
        ranks = {}
        if b is not None:
            exact = bool(changes) and all(row.exact for row in rows)
            ranks = {percent(share): _common_rank(changes, share) if exact else None for share in SHARES}
        theirs = () if b is None else tuple(n for n in b.forms if n not in a.forms and not _is_counter(b.forms[n]))
        return AuditReport(
            a=a.origin["path"],
            b=None if b is None else b.origin["path"],
            rank=self.rank,
            layers=tuple(row.found for row in rows),
            ranks=ranks,
            only_a=() if b is None else tuple(name for name in names if name not in b.forms),
            only_b=tuple(name for name in theirs if matches(name, self.match)),
        )

    def _row(self, name: str, a: Weights, b: Weights | None, twins: dict[tuple[object, ...], str]) -> "AuditedRow":
        form = a.forms[name]
        found: dict[str, Any] = {"name": name, "kind": kind_of(name, form.shape), "shape": form.shape, "notes": ()}
        if not _is_readable(form):
            return AuditedRow(found | {"kind": "other", "notes": (f"{_named(form)}: not read",)})
        if name in a.aliases and (b is None or name in b.aliases or name not in b.forms):
            return AuditedRow(found | {"notes": (f"shares its memory with {a.aliases[name]}",)})
        a_S = a.read(name)
        faults = faults_of(a_S)
        notes = list(faults)
        if not faults and (twin := twins.setdefault(_content(a_S), name)) != name:
            notes.append(f"equal to {twin}")
        other = None if b is None or name not in b.forms else b.forms[name]
        if b is not None and (reason := _incomparable(form, other)):
            notes, other = [*notes, reason], None
        b_S = b.read(name) if b is not None and other is not None else None
        faults_b = [] if b_S is None else faults_of(b_S)
        notes += [f"{fault} in B" for fault in faults_b if fault not in faults]
        row = self._compared(found, a_S, b_S, notes, _measurable(faults), _measurable(faults_b))
        return AuditedRow(found | {"notes": tuple(notes)} | row[0], *row[1:])

    def _compared(
        self, found: Mapping[str, Any], a_S: Tensor, b_S: Tensor | None, notes: list[str], a_sound: bool, b_sound: bool
    ) -> tuple[dict[str, Any], Tensor | None, bool]:
        """(parts of the row, singular values of the change, whether they are all); adds to the notes."""
        row: dict[str, Any] = {}
        finite = a_sound and b_sound and b_S is not None
        change_S = _difference(a_S, b_S) if finite and b_S is not None else None
        if change_S is not None and not change_S.any():
            notes.append("unchanged")
            change_S = None
        if found["kind"] == "vector":
            if change_S is not None:
                row["pair"] = {"relative": _relative(float(change_S.double().norm()), a_S), "intruders": None}
            return row, None, True
        whole = change_S is not None  # directions are needed
        one = Decomposition(as_matrix(a_S), self.largest, whole) if a_sound else None
        if one is not None:
            row["a"] = self.measures(one)
            notes += ["rank one"] * (one.exact and one.rank == 1)
            notes += [] if one.exact else [f"strongest {len(one.values_S)} of {min(one.matrix_OI.shape)} values only"]
        if one is None or b_S is None or not b_sound:
            return row, None, True
        if change_S is None:
            return row | {"b": row["a"]}, None, True
        two = Decomposition(as_matrix(b_S), self.largest)
        change = Decomposition(as_matrix(change_S), self.largest, directions=False)
        # What rounding B to its dtype alone can add stands out of nothing; it is no noise of one variance.
        row |= {"b": self.measures(two), "change": self.measures(change, rounding(b_S))}
        row["pair"] = self._pair(one, two, change)
        return row, change.values_S, change.exact

    def measures(self, found: Decomposition, least: float = 0.0) -> dict[str, Any]:
        """Numbers of one matrix, whose directions count as above noise from the singular value `least` on. None is what
        needs all values where only the strongest are known, or is not defined.

        rank (above a millionth of the largest), full (the most it could be), norm, effective_rank, stable_rank; noise,
        edge, above and misfit as in `NoiseFit`; ranks (least rank by share of the energy); error (bound on the values,
        as a share of the largest); values and null: (place, singular value) and (place, value of noise alone).
        """
        rows, columns = found.matrix_OI.shape
        values_S, full = found.values_S, min(rows, columns)
        top = float(values_S[0]) if len(values_S) and values_S[0] > 0 else 1.0
        unit_S = values_S / top
        fitted = fit_noise(unit_S, rows, columns) if found.exact else None
        place_P = torch.logspace(0, math.log10(max(1, len(values_S))), SHOWN).round().long().unique() - 1
        place_P = place_P[place_P < len(values_S)]
        noisy = fitted if fitted is not None and fitted.noise > 0 else None
        null_P = place_P[:0] if noisy is None else values_of_noise(noisy, rows, columns, place_P) * top
        return {
            "rank": found.rank if found.exact or found.rank < len(values_S) else None,
            "full": full,
            "norm": found.norm,
            "effective_rank": float(effective_rank(unit_S)) if found.exact else None,
            "stable_rank": float(stable_rank(unit_S)) if found.exact else (found.norm / top) ** 2,
            "noise": None if fitted is None else fitted.noise * top,
            "edge": None if fitted is None else max(least, fitted.edge * top),
            "above": None if fitted is None else min(fitted.above, int((values_S > least).sum())),
            "misfit": None if fitted is None else fitted.misfit,
            "ranks": {percent(share): _rank_for(unit_S, (found.norm / top) ** 2, share, full) for share in SHARES},
            "error": found.error,
            "values": tuple(zip(place_P.tolist(), values_S[place_P].tolist(), strict=True)),
            "null": tuple(zip(place_P[: len(null_P)].tolist(), null_P.tolist(), strict=True)),
        }

    def _pair(self, one: Decomposition, two: Decomposition, change: Decomposition) -> dict[str, Any]:
        share = float((change.values_S[: self.rank] / change.norm).square().sum()) if change.norm else None
        pair: dict[str, Any] = {"relative": change.norm / one.norm if one.norm else None, "kept": share}
        rank = min(self.rank, one.rank, two.rank, min(one.matrix_OI.shape) // 2)
        pair["rank"] = rank
        for side, a_NR, b_NR in zip(SIDES, one.frames(rank), two.frames(rank), strict=True):
            pair[side] = _subspaces(a_NR, b_NR) if rank else None
        pair["intruders"] = self._intruders(one, two)
        return pair

    def _intruders(self, one: Decomposition, two: Decomposition) -> dict[str, Any] | None:
        """None where all directions of A are not known, or a random direction would be no intruder either."""
        ceiling = cosine_ceiling(one.matrix_OI.shape[0], one.rank)
        if not one.exact or not two.rank or ceiling >= self.epsilon:
            return None
        cosine_K = one.cosines(two.frames(self.top)[0]).clamp(max=1)
        count = int((cosine_K < self.epsilon).sum())
        return {"count": count, "of": len(cosine_K), "cosines": tuple(cosine_K.tolist()), "ceiling": ceiling}


@dataclass(frozen=True)
class AuditedRow:
    """One tensor's entry in `AuditReport.layers`, and what the summary needs of it: the singular values of its change,
    and whether these are all.
    """

    found: Mapping[str, Any]
    change_S: Tensor | None = None
    exact: bool = True


def _subspaces(a_NR: Tensor, b_NR: Tensor) -> dict[str, Any]:
    angle_R = principal_angles(a_NR[None], b_NR[None])[0]
    width, rank = a_NR.shape
    return {
        "angles": tuple(angle_R.rad2deg().tolist()),
        "angle_floor": math.degrees(angle_floor(width, rank, rank)),
        "overlap": float(angle_R.cos().square().mean()),
        "overlap_mean": mean_overlap(width, rank, rank),
        "overlap_floor": overlap_floor(width, rank, rank),
    }


def _difference(a_S: Tensor, b_S: Tensor) -> Tensor:
    """b - a in float32, or in float64 where one of them is or the difference is beyond float32."""
    dtype = wide_type(a_S.dtype, b_S.dtype)
    change_S = b_S.to(dtype) - a_S.to(dtype)
    return change_S if change_S.isfinite().all() else b_S.double() - a_S.double()


def _relative(length: float, a_S: Tensor) -> float | None:
    own = float(a_S.double().norm())
    return length / own if own else None


def _rank_for(unit_S: Tensor, energy: float, share: float, full: int) -> int | None:
    """The least rank with this share of the energy; None where the known values do not reach it."""
    if len(unit_S) == full:
        return energy_rank(unit_S, share)
    reached_S = unit_S.square().cumsum(0) >= share * energy
    return int(reached_S.int().argmax()) + 1 if reached_S.any() else None


def _common_rank(changes: Sequence[Tensor], share: float) -> int:
    """The least rank of the changes of all matrices that together keeps this share of their energy."""
    total_S = torch.zeros(max(map(len, changes)), dtype=torch.float64)
    top = max(float(values_S[0]) for values_S in changes)  # so that no square overflows
    for values_S in changes:
        total_S[: len(values_S)] += (values_S / top).square()
    return energy_rank(total_S.sqrt(), share)


def _content(tensor: Tensor) -> tuple[object, ...]:
    """What equal tensors without NaN have in common, and no others."""
    numbers = (tensor + 0).contiguous()  # of -0 and 0, which are equal, one
    digest = hashlib.sha256(numbers.reshape(-1).view(torch.uint8).numpy().data).digest()
    return tuple(tensor.shape), tensor.dtype, digest


def _incomparable(form: Form, other: Form | None) -> str | None:
    if other is None:
        return "not in B"
    if not _is_readable(other):
        return f"{_named(other)} in B: not compared"
    if other.shape != form.shape:
        return f"{shown(other.shape)} in B: not compared"
    return None


def _measurable(faults: Sequence[str]) -> bool:
    """Whether ranks are defined: not for what is empty or not finite."""
    return not any(fault == "empty" or fault.endswith("infinite") for fault in faults)


def _is_readable(form: Form) -> bool:
    # Float8 goes with scales that another tensor holds, block by block.
    return form.dtype.is_floating_point and form.dtype.itemsize > 1


def _is_counter(form: Form) -> bool:
    return not form.dtype.is_floating_point and not form.dtype.is_complex and len(form.shape) < 2


def _named(form: Form) -> str:
    return str(form.dtype).removeprefix("torch.")
