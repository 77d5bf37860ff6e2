"""Plans the training step of a built recipe: its own precision, optimisers and callbacks, on fake tensors."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.optim import Optimizer

from lightspan.cli.planning.division import Division
from lightspan.cli.planning.plan import Plan, in_mib
from lightspan.cli.planning.rehearsal import loss_of, optimizers, prepare_model, silent, without_logging
from lightspan.cli.planning.step_memory import (
    OptimizerStopped,
    StepCounter,
    StepMemory,
    faked,
    idle_state_bytes,
    in_words,
    is_meta,
    largest_rows,
    nbytes,
)
from lightspan.core.batches import batch_type_of, rows_in
from lightspan.core.collate import resized
from lightspan.core.errors import UserError
from lightspan.core.resident import rss_bytes
from lightspan.datamodules.loading.loader import ExactLoader, split_batch
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.shards.stream import Shards
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.owners import bytes_of, fullest_rank
from lightspan.optim.random_subspace import RandomSubspace

_FEW = (2, 4)
"""Samples of the real steps that tell whether this machine has the memory for one of a whole micro-batch."""
_ROOM = 1.25
"""Memory that a real step may need, by that which is counted: temporaries inside of operations are not."""
_NO_LIMIT = 2**60  # version 1 of control groups writes a number of pages near 2**63


def make_plan(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    limit: int | None,
    real: bool = False,
    division: Division = Division(),  # noqa: B008 - frozen
    elsewhere: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Counts one step on a batch laid out like the datamodule's first one, and searches for the largest micro-batch.

    Args:
        module: with numbers, or on the meta device; of the latter a step that needs numbers raises what stopped it.
        limit: bytes of one rank, or None for what the device or this machine has.
        real: count a step on real tensors; a fake step that cannot run falls back to this by itself.
        division: of the step among ranks; the trainer itself has a single process.
        elsewhere: whether the run is meant for devices that this machine does not have, whose memory is unknown.
        say: is called with what happens next, as it may take a while.
    Raises: UserError for what cannot be planned: manual optimisation, a batch without tensors.
    """
    if not module.automatic_optimization:
        raise UserError(
            f"{type(module).__name__} uses manual optimisation (automatic_optimization=False), so its optimiser step "
            "cannot be separated from its training_step; measure it in a short run: "
            "`lightspan fit RECIPE trainer.max_steps=10`"
        )
    say("reading a batch")
    step = _Step(trainer, module, datamodule, division, elsewhere)
    rows = step.rows
    if rows == 0:
        raise UserError(f"the first batch of {type(datamodule).__name__} contains no tensor with samples along axis 0")
    process = 0 if step.on_device else max(0, _rss_at_work() - _resident(module))
    memory, source = (limit, "--memory") if limit is not None else _memory_there(trainer, elsewhere)
    room = None if memory is None else memory - process
    largest, notes = None, ["counted by a real step"]
    here: StepMemory | None = None
    say(f"counting a step of {rows} sample{'' if rows == 1 else 's'}")
    if not real:
        try:
            (here, largest), notes = step.fake(rows, room), []
        except UserError:
            raise
        except Exception as error:  # from any library that needs numbers where there are only shapes
            if is_meta(module):
                raise
            here, notes = None, [f"counted by a real step, since a fake one stopped ({in_words(error)})"]
    if here is None:
        *smaller, here = step.real(rows)
        for half in smaller:
            line = _line(half, here)
            largest = None if room is None else largest_rows(room, line, half, here)
            fits = here.rows == rows
            what = "the largest micro-batch is" if fits else f"for {rows} samples memory lacks here: all figures are"
            notes.append(f"{what} on a line through real steps of {half.rows} and {here.rows} samples")
            here = line(rows)
    if here.host_state:
        notes.append(f"{in_mib(here.host_state)} MiB of optimiser state live on the host, and are not counted above")
    return Plan(here, step.division, process, memory, source, largest, [*notes, *step.notes])


def _memory_there(trainer: Trainer, elsewhere: bool) -> tuple[int | None, str]:
    return (None, "unknown") if elsewhere else available_memory(trainer.strategy.root_device)


def available_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, their source): all of a CUDA device, or what the machine has free for new processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    if limit := cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        return limit, "the memory limit of this container or job"
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                # What this process already uses is counted in the plan.
                return int(line.split()[1]) * 1024 + rss_bytes(), "free on this machine"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "all of this machine"


def cgroup_limit(groups: Path, root: Path) -> int | None:
    """The least memory limit, in bytes, of a process's control groups, from its own up to the root; None without one.

    Args:
        groups: lines "0::/path" (version 2) or "N:memory:/path" (version 1), as in /proc/self/cgroup.
        root: where the groups are mounted. A container sees its own group there, whatever its path says.
    """
    limits = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / path.strip("/")
        files = [folder / name for folder in (own, *own.parents) if folder == top or top in folder.parents]
        texts = [file.read_text().strip() for file in files if file.is_file()]
        limits += [int(text) for text in texts if text.isdigit() and int(text) < _NO_LIMIT]  # "max" in version 2
    return min(limits, default=None)


def _resident(module: LightningModule) -> int:
    """Bytes that a module's parameters occupy in this process, which are no part of what surrounds a step."""
    return 0 if is_meta(module) else nbytes(module.parameters())


def _rss_at_work() -> int:
    """Resident bytes of this process once it has computed: libraries load their code at first use, some 20
    MiB that a process that has only built its model does not have yet.
    """
    x_BHTD = torch.ones(2, 2, 8, 16, requires_grad=True)
    weight_DD, kernel = (torch.ones(shape, requires_grad=True) for shape in ((16, 16), (2, 2, 3, 3)))
    y_BHTD = functional.layer_norm(x_BHTD @ weight_DD, (16,))
    y_BHTD = functional.scaled_dot_product_attention(y_BHTD, y_BHTD, y_BHTD, is_causal=True)
    y_BHTD = functional.batch_norm(functional.conv2d(y_BHTD, kernel, padding=1), None, None, training=True)
    logits_BV = functional.gelu(y_BHTD).flatten(0, 2)
    functional.cross_entropy(logits_BV, torch.zeros(len(logits_BV), dtype=torch.long)).backward()
    torch.optim.AdamW([weight_DD, kernel]).step()
    return rss_bytes()


class _Step:
    """One training step of a module as its trainer would run it, on one of the ranks among which it is divided."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        datamodule: LightningDataModule,
        division: Division,
        elsewhere: bool,
    ) -> None:
        self.trainer, self.division, self.elsewhere = trainer, division, elsewhere
        self.notes: list[str] = []
        datamodule.trainer = trainer
        batch, whole = None, None
        if isinstance(datamodule, Shards | SampleSets) and (batch := datamodule.stand_in()) is not None:
            whole = datamodule.batch_size
            self.notes.append("a batch of zeros, black or silent, stands in for the data, which are not here")
        else:
            datamodule.prepare_data()
            datamodule.setup("fit")
        with torch.device("meta") if is_meta(module) else contextlib.nullcontext():
            prepare_model(trainer, module, datamodule)
        if batch is None:
            loader = datamodule.train_dataloader()
            batch = next(iter(loader))
            whole = loader.batch_size if isinstance(loader, ExactLoader) else None
        self.batch = trainer.precision_plugin.convert_input(batch)
        self.batch_type = batch_type_of(datamodule, module)
        self.rows = rows_in(self.batch, self.batch_type)
        if whole is not None:  # the loader gives one process what all ranks together would see
            self.rows = split_batch(whole, division.ranks, trainer.accumulate_grad_batches)
        trainer.precision_plugin.convert_module(module)
        self.module = module.train()

    @property
    def on_device(self) -> bool:
        """Whether the run's steps have another memory than the host's."""
        return self.elsewhere or self.trainer.strategy.root_device.type != "cpu"

    def real(self, rows: int) -> list[StepMemory]:
        """Counts steps on real tensors, which change the weights: of half the samples, where there are enough to halve,
        and of all. Where this machine has no room for these, going by steps of few samples, those are given instead.
        """
        if rows < _FEW[1]:
            return [self._real(rows)]
        few = [self._measure(count) for count in _FEW]
        needed = _ROOM * _line(*few)(rows).peak + rss_bytes()
        if rows == _FEW[1] or needed > available_memory(torch.device("cpu"))[0]:
            return [self.division.of(step) for step in few]
        return [self._real(rows // 2), self._real(rows)]

    def _real(self, rows: int) -> StepMemory:
        step = self._measure(rows)  # whose optimisers say how it is divided
        return self.division.of(step)

    def fake(self, rows: int, room: int | None) -> tuple[StepMemory, int | None]:
        """Counts a step on fake tensors, and searches for the largest micro-batch within `room` bytes, unless that is
        None. An optimiser that reads numbers is replaced by its state after a real step.
        """
        try:
            return self._fake(rows, room, self._unchecked_optimizers)
        except OptimizerStopped as stopped:
            made: list[Optimizer] = []
            with silent(), _detached_after(made):
                made += self._optimizers()
                state = idle_state_bytes(self.module, made)
                idle = self._at_home(StepMemory(0, 0, 0, 0, 0, state, state), made)
            self.notes.append(
                f"optimiser state counted by a real step on zero gradients, since a fake one stopped ({stopped})"
            )
        return self._fake(rows, room, list, idle)

    def _fake(
        self,
        rows: int,
        room: int | None,
        make_optimizers: Callable[[], list[Optimizer]],
        idle: StepMemory = StepMemory(0, 0, 0, 0, 0, 0, 0),  # noqa: B008 - frozen
    ) -> tuple[StepMemory, int | None]:
        """With what optimisers hold beside those that are made."""
        state, host, peak = (
            -(-size // self.division.optimizer_state) for size in (idle.optimizer_state, idle.host_state, idle.peak)
        )

        def count(rows: int) -> StepMemory:
            step = of(rows)  # whose optimisers say how it is divided
            found = self.division.of(step)
            return dataclasses.replace(
                found,
                optimizer_state=found.optimizer_state + state,
                host_state=found.host_state + host,
                peak=found.peak + peak,
            )

        mode = FakeTensorMode()
        with faked(self.module, mode), mode, self._counting(make_optimizers) as of:
            here = count(rows)
            return here, None if room is None else largest_rows(room, count, here, count(2 * rows))

    def _measure(self, rows: int) -> StepMemory:
        """Of one rank that has all."""
        with self._counting(self._optimizers) as of:
            return of(rows)

    @contextlib.contextmanager
    def _counting(self, make_optimizers: Callable[[], list[Optimizer]]) -> Iterator[Callable[[int], StepMemory]]:
        """How much a step needs on one rank that has all, by the number of samples."""
        made: list[Optimizer] = []

        def make() -> list[Optimizer]:
            made.extend(make_optimizers())
            return made

        counter = StepCounter(self.module, self._loss, make, min(2, self.trainer.accumulate_grad_batches))
        with silent(), without_logging(self.module), _detached_after(made):
            yield lambda rows: self._at_home(counter.count(resized(self.batch, rows, self.batch_type), rows), made)

    def _at_home(self, found: StepMemory, made: list[Optimizer]) -> StepMemory:
        """Without the state that other ranks own, on the rank that has most of it; and on a device without that which
        lives on the host, but with room for its transfers. What is counted here has all of it in one place.
        """
        own = [each for each in made if isinstance(each, MatrixOptimizer)]
        kept = [fullest_rank(each.divided(self.division.ranks), each.state) for each in own]
        elsewhere = sum(
            bytes_of(held)
            for each, here in zip(own, kept, strict=True)
            for parameter, held in each.state.items()
            if parameter not in here
        )
        if elsewhere:
            note = f"{in_mib(elsewhere)} MiB of optimiser state belong to other ranks, and are not counted above"
            self.notes = [*dict.fromkeys([*self.notes, note])]
            state, peak = found.optimizer_state - elsewhere, found.peak - elsewhere
            found = dataclasses.replace(found, optimizer_state=state, peak=peak)
        if not self.on_device:
            return found
        sizes = [each.placement.sizes(here) for each, here in zip(own, kept, strict=True)]
        offloaded, transferred = (sum(size) for size in zip((0, 0), *sizes, strict=True))
        state, peak = found.optimizer_state - offloaded, found.peak - offloaded + transferred
        return dataclasses.replace(found, optimizer_state=state, peak=peak, host_state=offloaded)

    def _loss(self, batch: Any) -> Tensor:
        output = loss_of(self.trainer, self.module, batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise UserError(
                f"{type(self.module).__name__}.training_step returned no loss for the first batch, so nothing can be "
                "planned"
            )
        return loss

    def _optimizers(self) -> list[Optimizer]:
        found, left_out = optimizers(self.trainer, self.module)
        self.division = self.division.prepare(found)
        self.notes = [*dict.fromkeys([*self.notes, *left_out])]
        return found

    def _unchecked_optimizers(self) -> list[Optimizer]:
        """As trained, but none reads whether gradients are finite, which fake ones cannot tell."""
        found = self._optimizers()
        for optimizer in found:
            if isinstance(optimizer, MatrixOptimizer | RandomSubspace):
                optimizer.check_finite = False
        return found


@contextlib.contextmanager
def _detached_after(made: list[Optimizer]) -> Iterator[None]:
    """Afterwards the module has its own layers again, for the next optimisers, on other tensors."""
    try:
        yield
    finally:
        for optimizer in made:
            if isinstance(optimizer, LowRank) and optimizer.attachment is not None:
                optimizer.attachment.detach()


def _line(small: StepMemory, large: StepMemory) -> Callable[[int], StepMemory]:
    """Steps of other sizes, with what grows with them on the line through two measured ones."""

    def of(rows: int) -> StepMemory:
        share = (rows - large.rows) / (large.rows - small.rows)
        grown = {
            name: round(getattr(large, name) + share * (getattr(large, name) - getattr(small, name)))
            for name in ("batch", "activations", "peak")
        }
        return dataclasses.replace(large, rows=rows, **grown)

    return of
