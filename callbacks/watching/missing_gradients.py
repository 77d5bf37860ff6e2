"""Names the parameters that training never reaches: a layer that is not called, an output that is detached."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError, print_notes
from lightspan.optim.low_rank.optimizer import LowRank

MOST_NAMED = 8


class MissingGradients(Callback):
    """Prints once which parameters had no gradient in any of a run's first steps, with the likely cause.

    Looked at are the parameters of the optimisers that require a gradient when a step comes; frozen ones are no news.
    A module whose parameters all lack one is named instead of them. If the first step finds some, the following ones
    find out whether their modules are called. All ranks say what they lack in one exchange, in the same step, whether
    they lack anything or not. When training fails before that, as under DDP, which refuses a second step, each rank
    prints its own.

    Resumed runs are not looked at again, nor runs under DeepSpeed, where gradients are out of reach.

    Args:
        steps: optimiser steps to look at, >= 1: some layers are left out at random, or begin later.
    """

    alters_training = False  # see config.identity

    def __init__(self, steps: int = 3) -> None:
        if steps < 1:
            raise UserError(f"MissingGradients steps={steps} must be at least 1")
        self.steps = steps
        self._looks = False
        self._expected: dict[str, None] = {}
        self._reached: set[str] = set()
        self._called: set[str] | None = None  # modules, once there is something to find out
        self._listened = False  # for a step
        self._listeners: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looks = trainer.global_step == 0 and not trainer.strategy.handles_gradient_accumulation

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._looks:
            return
        self._listened = self._called is not None
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in pl_module.named_parameters():
            if id(parameter) in held and parameter.requires_grad:
                self._expected[name] = None
                if _has_gradient(parameter, optimizer):
                    self._reached.add(name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._looks or trainer.global_step == 0:
            return
        if trainer.global_step >= self.steps:
            self._report(trainer)
        elif self._called is None and self._missing():
            self._listen(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._looks and self._expected:
            self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._looks and self._missing():  # the other ranks may be anywhere: nothing is exchanged
            self._stop()
            print_notes([self._said(trainer, f" of rank {trainer.global_rank}" if trainer.world_size > 1 else "")])

    def _missing(self) -> list[str]:
        return [name for name in self._expected if name not in self._reached]

    def _listen(self, module: LightningModule) -> None:
        called: set[str] = set()
        self._called = called
        for name in dict.fromkeys(_owner(name) for name in self._missing()):
            heard = partial(_heard, called, name)
            self._listeners.append(module.get_submodule(name).register_forward_pre_hook(heard))

    def _stop(self) -> None:
        self._looks = False
        for listener in self._listeners:
            listener.remove()
        self._listeners = []

    def _report(self, trainer: Trainer) -> None:
        self._stop()
        mine = self._said(trainer, "")
        everyone: list[str] = [mine]
        if world_size() > 1:
            everyone = [""] * world_size()
            dist.all_gather_object(everyone, mine)
        if trainer.is_global_zero:
            ranks_by_text: dict[str, list[int]] = {}
            for rank, said in enumerate(everyone):
                ranks_by_text.setdefault(said, []).append(rank)
            for said, ranks in ranks_by_text.items():
                where = "" if len(ranks) == len(everyone) else f"on rank {', '.join(map(str, ranks))}: "
                print_notes([where + said] if said else [])

    def _said(self, trainer: Trainer, whose: str) -> str:
        """What to say of this rank's parameters; empty if all of them had a gradient."""
        missing = self._missing()
        if not missing:
            return ""
        parts = [self._named(part, names) for part, names in _parts(missing, self._expected)]
        more = f" and {len(parts) - MOST_NAMED} more" if len(parts) > MOST_NAMED else ""
        several = len(missing) > 1
        said = (
            f"{len(missing)} of {len(self._expected)} parameters{whose} had no gradient so far: "
            f"{'; '.join(parts[:MOST_NAMED])}{more}. Use {'them' if several else 'it'} in the loss, or freeze "
            f"{'them' if several else 'it'} with requires_grad_(False)"
        )
        if isinstance(trainer.strategy, DDPStrategy):
            said += "; DDP needs trainer.strategy=ddp_find_unused_parameters_true otherwise"
        return said

    def _named(self, part: str, names: list[str]) -> str:
        count = "" if names == [part] else f" ({len(names)} parameter{'s' if len(names) > 1 else ''})"
        return f"{part or 'the whole module'}{count}{self._cause(names)}"

    def _cause(self, names: list[str]) -> str:
        if self._called is None or not self._listened:
            return ""
        if any(_owner(name) in self._called for name in names):
            return ", which is called: its result does not reach the loss, or is detached or computed under no_grad"
        return ", which is never called as a module"


def _heard(called: set[str], name: str, module: nn.Module, arguments: Any) -> None:
    called.add(name)


def _has_gradient(parameter: Tensor, optimizer: Optimizer) -> bool:
    if parameter.grad is not None:
        return True
    if not isinstance(optimizer, LowRank) or optimizer.backward == "whole":
        return False
    groups = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    if not optimizer.projected(parameter, groups[0]):
        return False
    bucket, position = optimizer.place(parameter)
    return position in bucket.pending


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _parts(missing: list[str], expected: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(module or parameter, its names that are missing), where a module stands for its parameters if none of those
    expected has a gradient: the outermost such module.
    """
    lacking = set(missing)
    parts: dict[str, list[str]] = {}
    reached = [name for name in expected if name not in lacking]
    for name in missing:
        part = name
        while part and not any(other.startswith(_below(_owner(part))) for other in reached):
            part = _owner(part)
        parts.setdefault(part, []).append(name)
    yield from parts.items()


def _below(module: str) -> str:
    """How the names of a module's parameters begin."""
    return f"{module}." if module else ""
