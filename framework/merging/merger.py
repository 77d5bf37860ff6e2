"""`Merger`: merges checkpoints into one; and how that is written, tensor by tensor."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lightspan import __version__
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path
from lightspan.core.files.tensors import Form, write_tensors
from lightspan.core.results import Figure, Result
from lightspan.merging import span
from lightspan.merging.weights import Weights


class Merger(ABC):
    """Computes one tensor of the merged checkpoint from that tensor of each checkpoint.

    Settings belong to the constructor, which touches no file. The result has the names, shapes and dtypes of the
    leading checkpoint. Tensors without fractions (counters, positions, booleans) are the leading checkpoint's own, and
    no merger is asked for them. Names that share memory in all checkpoints share it in the merged one.

    Attributes:
        base: name of the checkpoint that the others were trained from; None for a merger that asks for none.
    """

    base: str | None = None

    @abstractmethod
    def leading(self, names: Sequence[str]) -> str:
        """Which of the named checkpoints leads. Raises: UserError if these are not what the merger needs."""

    def prepared(self, checkpoints: Mapping[str, Weights], forms: Mapping[str, Form]) -> Self:
        """The merger that knows what follows from all tensors together: a threshold over the whole model, say.

        `forms` are those of the tensors that it will be asked for. It is another object, or `self` where single tensors
        are enough.
        """
        return self

    def numbers_of(self, names: Sequence[str]) -> dict[str, float]:
        """What multiplies each checkpoint, or its change of the base, in every tensor: for the model card. Checkpoints
        without one such number are left out.
        """
        return {}

    @abstractmethod
    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        """One tensor of the result, of this form, from that of each checkpoint by the checkpoint's name.

        The given tensors are read-only, perhaps memory-mapped; computation is in float64
        (`lightspan.merging.span` does it in pieces), and the result is rounded once.
        """


@dataclass(frozen=True)
class Merged(Result):
    """What was merged; `parameters` counts numbers, shared ones once."""

    checkpoints: int
    merged: int
    taken: int
    parameters: int
    mib: float

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("checkpoints", self.checkpoints),
            Figure("tensors merged", self.merged),
            Figure("tensors copied unchanged", self.taken),
            Figure("parameters", self.parameters),
            Figure("size", self.mib, "MiB"),
        )


def outlook(merger: Merger, checkpoints: Mapping[str, Weights]) -> Merged:
    """What `merge` would write, without reading any tensor. Raises: UserError if checkpoints do not fit together."""
    leading = checkpoints[merger.leading(list(checkpoints))]
    require_alike(checkpoints)
    stored = _stored(leading, checkpoints)
    numbers, merged = sum(form.numbers for form in stored.values()), sum(map(_has_fractions, stored.values()))
    mib = sum(form.nbytes for form in stored.values()) / 2**20
    return Merged(len(checkpoints), merged, len(stored) - merged, numbers, mib)


def merge(
    merger: Merger, checkpoints: Mapping[str, Weights], out: Path, record: Mapping[str, str] | None = None
) -> Merged:
    """Writes the merged checkpoint to `out`, a safetensors file, whole or not at all.

    Its metadata record what was merged: path and sha256 of each checkpoint under `merged`, and the texts of `record`.
    Memory needs about one tensor beyond what the checkpoints themselves keep in memory.

    Raises: UserError where checkpoints do not fit together, a tensor of one or of the result holds NaN, one holds
        infinity that others do not have, or the result where no checkpoint does.
    """
    plan = MergePlan(merger, checkpoints)
    with atomic_path(out) as temporary:
        plan.write(temporary, list(plan.stored), record or {})
    return plan.outlook


class MergePlan:
    """Checkpoints that fit together, and the files that a merger makes of them.

    Attributes:
        leading: the checkpoint that gives names and forms.
        stored: the forms of all tensors that are written; those that share their memory with another are not.
        outlook: what is to be written.
    Raises: UserError where checkpoints do not fit together.
    """

    def __init__(self, merger: Merger, checkpoints: Mapping[str, Weights]) -> None:
        self.outlook = outlook(merger, checkpoints)
        self.leading = checkpoints[merger.leading(list(checkpoints))]
        self.stored = _stored(self.leading, checkpoints)
        self._checkpoints = checkpoints
        self._merger = merger.prepared(checkpoints, {n: f for n, f in self.stored.items() if _has_fractions(f)})

    def write(self, path: Path, names: Sequence[str], record: Mapping[str, str]) -> None:
        """Writes these of the tensors, and texts beside them; `path` is one that `atomic_path` gave, or inside it."""
        forms = {name: self.stored[name] for name in names}
        origins = json.dumps({name: weights.origin for name, weights in self._checkpoints.items()})
        facts = {"format": "pt", "lightspan": __version__, "merged": origins, **record}
        facts |= {n: kept for n, kept in _shared(self.leading, self._checkpoints).items() if kept in forms}
        write_tensors(path, forms, _tensors(self._merger, self.leading, forms, self._checkpoints), facts)


def require_alike(checkpoints: Mapping[str, Weights]) -> None:
    """Raises: UserError that names the tensors that not all checkpoints have in the same form."""
    first_name, first = next(iter(checkpoints.items()))
    wrong = []
    for name, weights in checkpoints.items():
        ours, theirs = first.forms.keys(), weights.forms.keys()
        wrong += [f"{tensor} is in {first_name} but not in {name}" for tensor in ours - theirs]
        wrong += [f"{tensor} is in {name} but not in {first_name}" for tensor in theirs - ours]
        for tensor in first.forms.keys() & weights.forms.keys():
            here, there = first.forms[tensor], weights.forms[tensor]
            if here.shape != there.shape:
                wrong.append(f"{tensor} is {list(here.shape)} in {first_name} but {list(there.shape)} in {name}")
            elif _kind(here) != _kind(there):
                wrong.append(f"{tensor} is {here.dtype} in {first_name} but {there.dtype} in {name}")
    if wrong:
        raise UserError(
            f"checkpoints of different models cannot be merged: {'; '.join(sorted(wrong)[:3])}"
            + f"; and {len(wrong) - 3} more" * (len(wrong) > 3)
            + ". Merge only what was trained from the same model and exported in the same way"
        )


def _tensors(
    merger: Merger, leading: Weights, stored: Mapping[str, Form], checkpoints: Mapping[str, Weights]
) -> Iterator[tuple[str, Tensor]]:
    for name, form in stored.items():
        if not _has_fractions(form):
            yield name, leading.read(name)
            continue
        # The tensor gets no name here: this frame would keep it while the next one is computed.
        yield name, _merged(merger, name, form, {n: w.read(name) for n, w in checkpoints.items()})


def _merged(merger: Merger, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
    _require_valid(name, weights)
    tensor = merger.tensor(name, form, weights)
    assert tensor.dtype == form.dtype, f"{name} was merged as {tensor.dtype}, not {form.dtype}"
    assert tuple(tensor.shape) == form.shape, f"{name} was merged as {list(tensor.shape)}, not {list(form.shape)}"
    if tensor.isnan().any():
        raise UserError(
            f"{name} of the merged checkpoint would hold NaN, from infinite differences: merge checkpoints from before "
            "the run diverged, or lower the coefficients"
        )
    for at in range(0, tensor.numel(), span.CHUNK):
        pieces = (x.reshape(-1)[at : at + span.CHUNK] for x in (tensor, *weights.values()))
        infinite, *given = (span.widest(piece).isinf() for piece in pieces)  # types of a byte do not know the question
        if (infinite & ~torch.stack(given).any(dim=0)).any():
            raise UserError(
                f"{name} of the merged checkpoint would have infinity where no checkpoint has: {form.dtype} ends at "
                f"{torch.finfo(form.dtype).max:g}; lower the coefficients, or lead with a checkpoint of a wider dtype"
            )
    return tensor


def _require_valid(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raises: UserError for NaN, and for infinity where the checkpoints differ: what all share, as a mask of attention
    does, is no sign of divergence, and stays.
    """
    flat = {source: tensor.reshape(-1) for source, tensor in weights.items()}
    first = next(iter(flat.values()))
    for at in range(0, first.numel(), span.CHUNK):
        pieces = {source: span.widest(tensor[at : at + span.CHUNK]) for source, tensor in flat.items()}
        differ = torch.stack([piece != pieces[next(iter(pieces))] for piece in pieces.values()]).any(dim=0)
        for source, piece in pieces.items():
            found = "NaN" if piece.isnan().any() else "infinity" if (piece.isinf() & differ).any() else None
            if found:
                raise UserError(
                    f"{name} of the checkpoint {source} holds {found}; merge checkpoints from before the run diverged"
                )


def _kind(form: Form) -> tuple[bool, bool]:
    return form.dtype.is_floating_point, form.dtype.is_complex


def _has_fractions(form: Form) -> bool:
    return form.dtype.is_floating_point or form.dtype.is_complex


def _shared(leading: Weights, checkpoints: Mapping[str, Weights]) -> dict[str, str]:
    return {
        name: kept
        for name, kept in leading.aliases.items()
        if all(weights.aliases.get(name) == kept for weights in checkpoints.values())
    }


def _stored(leading: Weights, checkpoints: Mapping[str, Weights]) -> dict[str, Form]:
    shared = _shared(leading, checkpoints)
    return {name: form for name, form in leading.forms.items() if name not in shared}
