"""`lightspan plan RECIPE`: how much memory a run will need, before anything starts."""

import argparse
import json
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from lightspan.cli.planning.plan import MIB, as_json, in_mib, measured_peak, shares, verdict
from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError, printable
from lightspan.core.files.runs import PLAN

if TYPE_CHECKING:
    from lightspan.cli.planning.plan import Plan

GIB = 2**30
HALF = "trainer.precision=bf16-true"
_CHECKPOINTING = {"class_path": "lightspan.callbacks.training.activation_checkpointing.ActivationCheckpointing"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from lightspan.cli.commands.arguments import add_data_arguments, add_recipe_arguments, folder

    add_recipe_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="memory of one rank (default: that of the device here, or on the CPU what this machine has free)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="plan one of N ranks without starting them (default: the recipe's number)",
    )
    parser.add_argument(
        "--real", action="store_true", help="run the step on real tensors on this machine: slower, but exact"
    )
    parser.add_argument(
        "--run",
        type=folder,
        metavar="DIR",
        help="run folder: writes DIR/plan.json and compares the plan with the peak in DIR/summary.json",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises: UserError for a recipe that cannot be built or planned."""
    from lightspan.cli.commands.arguments import resolved_from
    from lightspan.cli.config.build import Built, build, with_layer
    from lightspan.cli.config.recipes import stand_ins
    from lightspan.cli.planning.division import division, strategy_of
    from lightspan.cli.planning.one_process import in_one_process
    from lightspan.cli.planning.planned_step import make_plan
    from lightspan.cli.planning.rehearsal import without_trace
    from lightspan.cli.planning.shapes import on_meta_first

    if args.memory is not None and not args.memory > 0:
        raise UserError(f"--memory {args.memory:g} must be more than 0 GiB; leave it out to take what this machine has")
    resolved = resolved_from(args)
    if args.ranks is not None and args.ranks < 1:
        raise UserError(f"--ranks {args.ranks} must be at least 1")
    given = resolved.config.get("trainer", {}).get("strategy")
    strategy = strategy_of(given)
    if isinstance(given, dict) and (given.get("init_args") or {}).get("activation_checkpointing"):
        # One process plans without the strategy; the callback recomputes the same blocks.
        resolved = with_layer(resolved, {"trainer": {"callbacks": {"activation_checkpointing": _CHECKPOINTING}}})
    ranks, nodes = args.ranks or _ranks(resolved.config), _whole(resolved.config, "num_nodes")
    limit, elsewhere = None if args.memory is None else int(args.memory * GIB), _elsewhere(resolved.config, ranks)

    def planned(built: Built) -> "Plan":
        if built.datamodule is None:
            raise UserError(f"{resolved.name} has no data, so there is no batch to plan with; add `data:` to it")
        shared = division(strategy, built.model, ranks, nodes)
        return make_plan(
            built.trainer, built.model, built.datamodule, limit, args.real, shared, elsewhere, partial(_say, started)
        )

    started = time.monotonic()
    _say(started, f"building {resolved.name}")
    with without_trace(in_one_process(resolved)) as (alone, scratch):
        try:
            plan = planned(build(alone, scratch)) if args.real else on_meta_first(alone, planned, scratch)
        except MissingFile as error:
            if not (overlays := stand_ins(resolved.name)):
                raise
            raise UserError(f"{error}; or plan with stand-ins for what is missing: add {overlays}") from error
    measured = measured_peak(args.run) if args.run else None
    _print(plan, resolved.name, measured, str(resolved.config.get("trainer", {}).get("precision", "32-true")))
    if args.run:
        from lightspan.core.files.atomic import write_atomic

        path = args.run / PLAN
        write_atomic(path, json.dumps(as_json(plan, measured), indent=2) + "\n")
        print(printable(f"wrote {path}"))
    return 0


def _say(started: float, what: str) -> None:
    """What happens next, after how many seconds; not on standard output, which is for the plan."""
    print(printable(f"plan: {time.monotonic() - started:3.0f} s: {what}"), file=sys.stderr, flush=True)


def _elsewhere(config: dict[str, Any], ranks: int) -> bool:
    """Whether the run is meant for GPUs and this machine has none, so that what it has says nothing about the run."""
    import torch

    accelerator = config.get("trainer", {}).get("accelerator", "auto")
    asked = accelerator not in ("auto", "cpu") or (accelerator == "auto" and ranks > 1)
    return asked and not torch.cuda.is_available()


def _print(plan: "Plan", name: str, measured: tuple[str, float] | None, precision: str) -> None:
    from rich.table import Table

    from lightspan.core.console import SafeConsole

    ranks = f", one of {plan.division.ranks} ranks" if plan.division.ranks > 1 else ""
    table = Table(title=f"One optimiser step of {name}{ranks}", title_justify="left")
    for heading in ("", "MiB", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, size, share in shares(plan):
        table.add_row(what, in_mib(size), f"{100 * share:.1f} %")
    table.add_section()
    table.add_row("peak of these at one time, with temporaries", in_mib(plan.step.peak), "")
    if plan.process:
        table.add_row("Python, libraries and data in this process", in_mib(plan.process), "")
        table.add_row("together", in_mib(plan.total), "")
    console = SafeConsole()
    console.print(table)
    lines = [verdict(plan), _fit_line(plan, precision)]
    if measured is not None:
        key, mib = measured
        error = 100 * (plan.total / MIB - mib) / mib
        lines.append(f"The finished run recorded {key} {mib:,.1f}; the plan is {error:+.1f} % off.")
    lines += [f"Note: {note}." for note in plan.notes]
    console.print("\n".join(lines), markup=False, highlight=False)


def _ranks(config: dict[str, Any]) -> int:
    return _whole(config, "devices") * _whole(config, "num_nodes")


def _whole(config: dict[str, Any], key: str) -> int:
    """A number of the trainer; 1 if it is left to the machine, which is not queried here."""
    value = config.get("trainer", {}).get(key)
    return len(value) if isinstance(value, list) else value if isinstance(value, int) and value > 0 else 1


def _fit_line(plan: "Plan", precision: str) -> str:
    if plan.memory is None:
        return (
            "Memory: this machine has no GPU, so the plan is compared with nothing; add --memory GIB, the memory of "
            "one GPU, and it says what fits."
        )
    has = f"Memory: {plan.memory / GIB:.1f} GiB ({plan.memory_source})"
    if plan.largest_rows is None:
        return f"{has}; too few samples in a batch to tell the largest micro-batch."
    if plan.step.rows <= plan.largest_rows:
        return f"{has}: the micro-batch of {plan.step.rows} fits; the largest that does is {plan.largest_rows:,}."
    way_out = "" if "16-true" in precision else f" {HALF} halves weights, gradients and activations."
    if plan.largest_rows == 0:
        return f"{has}: not even a micro-batch of 1 sample fits.{way_out}"
    return (
        f"{has}: the micro-batch of {plan.step.rows} does NOT fit; the largest that does is {plan.largest_rows:,}."
        f"{way_out}"
    )
