"""What a rank loads: its part of each batch follows from the trainer or, without one, from the process group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightspan.core.distributed import rank, world_size
from lightspan.core.errors import UserError, printable
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader, split_batch
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.datamodules.loading.subset import subset_of
from lightspan.datamodules.loading.workers import Dataset

_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


@rank_zero_only
def say(line: str) -> None:
    """Prints one line on the first rank: what was found, before training starts. Inside `each_line_once` not again."""
    said = _said.get()
    if said is None or line not in said:
        print(printable(line), flush=True)
    if said is not None:
        said.add(line)


@contextmanager
def each_line_once() -> Iterator[None]:
    """For what reads the same data several times, as inputs of an estimator do that are of one data module."""
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def sizes(training: int, validation: int | None, test: int, samples: str) -> str:
    """How many samples each part has, for a line. `validation` is None where it has no samples of its own."""
    if validation is None:
        return f"{training} training and {test} test {samples} (validation uses the test set)"
    return f"{training} training, {validation} validation and {test} test {samples}"


def data_rank(trainer: Trainer | None) -> tuple[int, int]:
    """(rank, world_size) among the ranks that see different data; without a trainer, from the process group."""
    if trainer is None:
        return rank(), world_size()
    # A strategy that also splits the model has fewer data ranks than processes; it tells their number here.
    replicas = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return replicas["rank"], replicas["num_replicas"]


def micro_batch_size(batch_size: int, trainer: Trainer | None) -> int:
    """Samples of one forward pass on one rank: batch_size / (data ranks * accumulate_grad_batches).

    Raises: UserError if it does not divide evenly.
    """
    return split_batch(batch_size, data_rank(trainer)[1], trainer.accumulate_grad_batches if trainer else 1)


def train_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    num_workers: int,
    trainer: Trainer | None,
    order: Order | None = None,
    selection: ReadPath | None = None,
) -> ExactLoader:
    """The `ExactLoader` for this rank of `trainer`; `batch_size` is that of one optimiser step over all ranks. It loads
    what `selection` says, the file of a `lightspan.datamodules.loading.selection.DataSelection`, and of that, where the
    trainer has a `TrainingSubset`, that part; a line says how many samples were selected.
    """
    own, ranks = data_rank(trainer)
    if selection is not None:
        everything = len(dataset)
        dataset, order = DataSelection.read(selection).taken(dataset, order)
        say(f"selection: {len(dataset):,} of {everything:,} training samples, by {selection}")
    if (subset := subset_of(trainer)) is not None:
        dataset, order = subset.taken(dataset, order)
    if trainer is None:
        return ExactLoader(dataset, batch_size, seed, own, ranks, num_workers=num_workers, order=order)
    if overfit := trainer.overfit_batches:  # type: ignore[attr-defined]  # a connector of the trainer sets it
        raise UserError(
            f"trainer.overfit_batches={overfit} would see other samples in each epoch, since the order is "
            "reshuffled; use a small data set instead, or use trainer.limit_train_batches"
        )
    return ExactLoader(
        dataset,
        batch_size,
        seed,
        own,
        ranks,
        trainer.accumulate_grad_batches,
        num_workers,
        trainer.limit_train_batches,
        pins_memory(trainer),
        order,
    )


def evaluation_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    trainer: Trainer | None,
    indices: Sequence[int] | None = None,
) -> EvaluationLoader:
    """The `EvaluationLoader` for this rank of `trainer`, with training's micro-batch size."""
    micro = micro_batch_size(batch_size, trainer)
    return EvaluationLoader(
        dataset, micro, *data_rank(trainer), num_workers=num_workers, pin_memory=pins_memory(trainer), indices=indices
    )


def pins_memory(trainer: Trainer | None) -> bool:
    """Whether batches should be in page-locked memory, from which copies to a GPU are fastest."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
