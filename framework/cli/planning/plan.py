"""The memory of a training step: its shares, where memory can be saved, and how far off it was."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import SUMMARY

if TYPE_CHECKING:  # both load torch, and `plan --help` need not
    from lightspan.cli.planning.division import Division
    from lightspan.cli.planning.step_memory import StepMemory

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes in bytes on one rank.

    Attributes:
        step: memory of one step.
        division: how a strategy divides it among ranks; `step` is one rank's share.
        process: resident memory outside the step in a CPU run: interpreter, loaded libraries, data; 0 on a device.
        memory: what a rank has, and the source of that figure; None if nobody said.
        largest_rows: largest micro-batch that fits, 0 if none does, None if it could not be searched.
        notes: what was not counted the usual way, and why.
    """

    step: "StepMemory"
    division: "Division"
    process: int
    memory: int | None
    memory_source: str
    largest_rows: int | None
    notes: list[str]

    @property
    def total(self) -> int:
        """The expected peak of the run."""
        return self.step.peak + self.process


def shares(plan: Plan) -> list[tuple[str, int, float]]:
    """(what, bytes, share of the sum) for everything in memory during a step."""
    step = plan.step
    parts = [
        ("weights", step.weights),
        ("gradients", step.gradients),
        ("optimiser state", step.optimizer_state),
        (f"activations, {step.rows} samples", step.activations),
        ("batch", step.batch),
    ]
    if plan.division.extra:
        parts.append((plan.division.extra_name, plan.division.extra))
    total = sum(size for _, size in parts) or 1
    return [(name, size, size / total) for name, size in parts]


def verdict(plan: Plan) -> str:
    """Which part is larger, and so where memory can be saved."""
    step = plan.step
    activations, state = in_mib(step.activations), in_mib(step.optimizer_state)
    if step.activations > step.optimizer_state:
        return (
            f"Activations outweigh optimiser state ({activations} against {state} MiB): a leaner optimiser saves at "
            f"most {state} MiB; a smaller micro-batch with more accumulation, or activation checkpointing, saves more."
        )
    return (
        f"Optimiser state outweighs activations ({state} against {activations} MiB): a low-rank optimiser saves most."
    )


def measured_peak(run_dir: Path) -> tuple[str, float] | None:
    """(key, MiB) of the peak that the run's summary recorded: of the device if it had one, else of the process."""
    path = run_dir / SUMMARY
    if not path.is_file():
        return None
    try:
        summary = settings_object(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}; fix or remove it") from error
    for key in ("peak_device_mib", "peak_rss_mib"):
        if isinstance(summary.get(key), int | float):
            return key, float(summary[key])
    return None


def as_json(plan: Plan, measured: tuple[str, float] | None) -> dict[str, Any]:
    """The plan in bytes as the content of plan.json, with the measured peak (MiB), if there is one."""
    recorded = {} if measured is None else {f"measured_{measured[0]}": measured[1]}
    parts = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    parts |= {"step": dataclasses.asdict(plan.step), "division": plan.division.figures}
    return {**parts, "planned_total": plan.total, **recorded}


def in_mib(size: int) -> str:
    """Bytes as text in MiB."""
    return f"{size / MIB:,.1f}"
