"""On how many ranks a run may continue: global batch and order of samples stay, and each rank gets a share."""

import importlib
import inspect
import os
from typing import Any

from lightspan.cli.config.resolve import Resolved
from lightspan.core.errors import UserError

OWN_DATA = "lightspan.datamodules."


def global_batch(resolved: Resolved) -> int | None:
    """Samples of one optimiser step over all ranks; None for the data of others, who may mean something else by it."""
    data = resolved.config.get("data")
    if not isinstance(data, dict) or not data.get("class_path", "").startswith(OWN_DATA):
        return None
    module, _, name = data["class_path"].rpartition(".")
    batch_size = data.get("init_args", {}).get("batch_size")
    if batch_size is None:
        batch_size = _default(getattr(importlib.import_module(module), name), "batch_size")
    return batch_size if isinstance(batch_size, int) else None


def _default(kind: type, argument: str) -> Any:
    """Of a class, or of the base to which it hands what it does not name itself; None without any."""
    signatures = (inspect.signature(each).parameters for each in kind.__mro__ if each is not object)
    return next((parameters[argument].default for parameters in signatures if argument in parameters), None)


def micro_batches(resolved: Resolved) -> int:
    """Those of one optimiser step on one rank, as the recipe has them."""
    accumulate = resolved.config.get("trainer", {}).get("accumulate_grad_batches", 1)
    return accumulate if isinstance(accumulate, int) else 1


def usable_counts(resolved: Resolved, most: int) -> list[int]:
    """The numbers of ranks up to `most` among which a step's samples can be shared evenly, from the largest down; all
    of them for the data of others, which are not known here.
    """
    batch, parts = global_batch(resolved), micro_batches(resolved)
    return [count for count in range(most, 0, -1) if batch is None or batch % (count * parts) == 0]


def refuse_fixed_ranks(resolved: Resolved) -> None:
    """Raises: UserError for a strategy whose checkpoints continue only on the number of ranks that wrote them."""
    strategy = resolved.config.get("trainer", {}).get("strategy")
    named = strategy.get("class_path", "") if isinstance(strategy, dict) else str(strategy)
    if named.startswith("lightspan.training.deepspeed.") and not _divided_by_matrices(resolved):
        raise UserError(
            f"trainer.strategy {named}: ZeRO's checkpoints continue only on the number of ranks that wrote them, so a "
            "run cannot continue without a lost one; use scale/ddp or scale/fsdp2, or an optimiser of matrices such as "
            "lightspan.optim.muon.FactoredMuon, whose checkpoints are whole"
        )


def _divided_by_matrices(resolved: Resolved) -> bool:
    """Whether the recipe names an optimiser whose steps ZeRO divides by whole matrices."""
    given = resolved.config.get("model", {}).get("init_args", {}).get("optimizer")
    module, _, name = given.get("class_path", "").rpartition(".") if isinstance(given, dict) else ("", "", "")
    if not module.startswith("lightspan.optim."):
        return False
    from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer

    return issubclass(getattr(importlib.import_module(module), name), MatrixOptimizer)


def on_started_ranks(resolved: Resolved, most_rows: int | None) -> dict[str, Any]:
    """The change with which a recipe runs on the ranks that a launcher has started: one, if none has.

    Args:
        most_rows: samples of a rank's micro-batch at most, >= 1; a step is divided into more micro-batches until it is
            kept. None leaves their number as it is, so that a micro-batch over all ranks has the same samples on any
            number of them, which losses that compare the samples of a batch need.
    Raises: UserError if no number of micro-batches does it.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_each_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    change: dict[str, Any] = {"devices": on_each_node, "num_nodes": ranks // on_each_node}
    if most_rows is not None:
        change["accumulate_grad_batches"] = _smallest_division(resolved, ranks, most_rows)
    return {"trainer": change}


def _smallest_division(resolved: Resolved, ranks: int, most_rows: int) -> int:
    batch, parts = global_batch(resolved), micro_batches(resolved)
    if batch is None:
        raise UserError(
            "--most-rows needs to know how many samples a step has, which only lightspan's data modules say as "
            "batch_size; set trainer.accumulate_grad_batches instead"
        )
    rows, rest = divmod(batch, ranks)
    fitting = [count for count in range(parts, rows + 1) if rows % count == 0 and rows // count <= most_rows]
    if rest or not fitting:
        raise UserError(
            f"--most-rows {most_rows}: batch_size={batch} does not divide evenly among {ranks} ranks and {parts} or "
            "more micro-batches of so few samples; set data.init_args.batch_size to a multiple of the ranks and of the "
            "samples of a micro-batch"
        )
    return fitting[0]
