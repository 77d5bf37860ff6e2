"""Differences of two runs: in their last checkpoints, the samples and losses of their steps, the logged figures."""

import contextlib
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightspan.cli.runs.folder import LAST_CHECKPOINT
from lightspan.cli.runs.json_lines import json_lines
from lightspan.core.files.runs import METRICS, TRACE

MEASURED = ("time_s", "seconds", "step_ms", "throughput/", "memory/")
"""Prefixes of names of what is measured and not computed: times, speeds and memory are not promised."""


class Batch(NamedTuple):
    """What a run saw and did in one micro-batch.

    Attributes:
        samples: digests over all ranks, sorted.
        loss: mean over ranks.
        buffers: "rank-N: name" -> digest, of buffers that checkpoints leave out.
    """

    samples: list[str]
    loss: float
    buffers: dict[str, str]


def first_difference(straight: Path, killed: Path) -> str | None:
    """The first difference in bits of two runs on the same ranks, named; None if there is none."""
    for place, difference in differences(_stored(straight), _stored(killed), "checkpoint"):
        return f"{place} {difference}"
    return (
        first_other_batch(straight, killed, 0.0)
        or _first_other_buffer(straight, killed)
        or _first_other_line(straight, killed)
    )


def _stored(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint, without what is measured, and without the name of the run's folder."""
    from lightspan.training.checkpoints.io import WholeFileCheckpointIO

    stored = WholeFileCheckpointIO().load_checkpoint(run_dir / LAST_CHECKPOINT)
    told = {key: _computed(stored[key], str(run_dir)) for key in ("callbacks", "lightspan") if key in stored}
    return stored | told


def _computed(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(folder, "${run}")
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not str(key).startswith(MEASURED)}
        return {_computed(key, folder): _computed(item, folder) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [_computed(item, folder) for item in value]
    return value


def differences(expected: Any, found: Any, place: str) -> Iterator[tuple[str, str]]:
    """(place, what differs) of two trees of dicts, lists, tensors and plain values.

    Tensors and floats are compared bit by bit: zero differs from minus zero, but NaN not from itself.
    """
    import torch

    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        if said := _other_tensor(expected, found):
            yield place, said
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            if key in expected and key in found:
                yield from differences(expected[key], found[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}", f"is only in the {'straight' if key in expected else 'killed'} run"
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif isinstance(expected, float) and isinstance(found, float):
        if struct.pack("d", expected) != struct.pack("d", found) and not (math.isnan(expected) and math.isnan(found)):
            yield place, f"is {found!r} instead of {expected!r}"
    elif type(expected) is not type(found) or expected != found:
        yield place, f"is {found!r:.80} instead of {expected!r:.80}"


def _other_tensor(expected: Any, found: Any) -> str | None:
    import torch

    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"is {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if not expected.numel():
        return None
    one, other = (tensor.contiguous().reshape(-1, 1) for tensor in (expected, found))
    differs = (one.view(torch.uint8) != other.view(torch.uint8)).any(dim=1)
    if not differs.any():
        return None
    exact = torch.complex128 if expected.is_complex() else torch.float64
    away = (one.to(exact) - other.to(exact)).abs().max()
    return f"differs in {int(differs.sum())} of {len(one)} numbers, by up to {away:.3g}"


def first_other_batch(one: Path, other: Path, tolerance: float | None = None) -> str | None:
    """The first batch with other samples over all ranks, or a mean loss off by more than `tolerance`, relative."""
    expected, found = trace_of(one), trace_of(other)
    for batch in sorted(expected.keys() | found.keys()):
        if batch not in expected or batch not in found:
            return f"batch {batch} is only in {one.name if batch in expected else other.name}"
        (samples, loss, _), (other_samples, other_loss, _) = expected[batch], found[batch]
        missing = sorted(set(samples) - set(other_samples))
        if samples != other_samples:
            first = missing[0] if missing else "none, but counts differ"
            return f"batch {batch} has other samples: {len(missing)} of {len(samples)} missing, the first {first}"
        near = abs(loss - other_loss) <= (tolerance or 0.0) * abs(loss) or (math.isnan(loss) and math.isnan(other_loss))
        if tolerance is not None and not near:
            return f"the loss of batch {batch} is {other_loss!r} instead of {loss!r}"
    return None if expected else "no batch was seen at all"


def _first_other_buffer(straight: Path, killed: Path) -> str | None:
    expected, found = trace_of(straight), trace_of(killed)
    for batch in sorted(expected.keys() & found.keys()):
        for place, _ in differences(expected[batch].buffers, found[batch].buffers, "buffer"):
            return f"{place}, which is in no checkpoint, differs in batch {batch}"
    return None


def largest_difference(one: Path, other: Path) -> float:
    """The largest relative difference of the mean losses of batches that both runs saw; NaN where one is NaN."""
    expected, found = trace_of(one), trace_of(other)
    pairs = [(expected[batch].loss, found[batch].loss) for batch in expected.keys() & found.keys()]
    away = [abs(loss - other_loss) / max(abs(loss), sys.float_info.min) for loss, other_loss in pairs]
    return math.nan if any(map(math.isnan, away)) else max(away, default=0.0)


def first_distant_weight(one: Path, other: Path, tolerance: float) -> str | None:
    """The first tensor of the last checkpoints' weights that differs by more than `tolerance` times its largest number,
    or at all where it has whole numbers.
    """
    import torch

    from lightspan.training.checkpoints.io import read_checkpoint

    expected, found = (read_checkpoint(run / LAST_CHECKPOINT, optimizers=False)["state_dict"] for run in (one, other))
    for name in dict.fromkeys([*expected, *found]):
        if name not in expected or name not in found or expected[name].shape != found[name].shape:
            return f"{name} is not in both checkpoints, of one shape"
        a, b = expected[name], found[name]
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{name} differs"
        elif a.numel() and not (away := float((a - b).abs().max())) <= tolerance * float(a.abs().max()):
            return f"{name} differs by up to {away:.3g}"
    return None


def redone(run_dir: Path) -> int:
    """Batches that a run has done in more than one of its starts."""
    starts: dict[int, set[float]] = {}
    for _, entry in _traced(run_dir):
        starts.setdefault(entry["batch"], set()).add(entry["start_s"])
    return sum(len(times) > 1 for times in starts.values())


def _traced(run_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(rank-N, line) of all that `callbacks.proof.Trace` wrote."""
    for path in sorted((run_dir / TRACE).glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that the kill cut short
                yield path.stem, json.loads(line)


def trace_of(run_dir: Path) -> dict[int, Batch]:
    """Batch number -> what `callbacks.proof.Trace` wrote about it in its last attempt."""
    last: dict[int, dict[str, Any]] = {}
    for rank, entry in _traced(run_dir):
        last.setdefault(entry["batch"], {})[rank] = entry
    trace = {}
    for batch, by_rank in last.items():
        newest = max(entry["start_s"] for entry in by_rank.values())
        entries = {rank: entry for rank, entry in by_rank.items() if entry["start_s"] == newest}
        losses = [entry["loss"] for entry in entries.values()]
        buffers = {
            f"{rank}: {name}": digest for rank, entry in entries.items() for name, digest in entry["buffers"].items()
        }
        samples = sorted(digest for entry in entries.values() for digest in entry["samples"])
        trace[batch] = Batch(samples, sum(losses) / len(losses), buffers)
    return trace


def _first_other_line(straight: Path, killed: Path) -> str | None:
    """The first logged figure that differs, is missing, or was logged more than once."""
    expected, found = _logged(straight), _logged(killed)
    for step, name in dict.fromkeys([*expected, *found]):
        one, other = expected.get((step, name), []), found.get((step, name), [])
        for _ in differences(one, other, ""):
            return f"the logged {name} of step {step} is {_said(other)} instead of {_said(one)}"
    return None


def first_other_count(straight: Path, other: Path) -> str | None:
    """The first figure that was not logged as often for a step as in the straight run, whatever its value."""
    expected, found = _logged(straight), _logged(other)
    for step, name in dict.fromkeys([*expected, *found]):
        times, wanted = (len(logged.get((step, name), [])) for logged in (found, expected))
        if times != wanted:
            return f"{name} of step {step} was logged {times} times instead of {wanted}"
    return None


def _said(values: list[Any]) -> str:
    return " and ".join(map(repr, values)) or "missing"


def _logged(run_dir: Path) -> dict[tuple[int, str], list[Any]]:
    """(step, name) -> all that was logged under it, in order."""
    logged: dict[tuple[int, str], list[Any]] = {}
    for line in json_lines(run_dir / METRICS):
        step = line.pop("step")
        for name, value in line.items():
            if not name.startswith(MEASURED):
                logged.setdefault((step, name), []).append(value)
    return logged
