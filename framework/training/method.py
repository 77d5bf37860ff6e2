"""`Method`: the thin base class of every method in lightspan. A convenience, never a requirement of callbacks or
optimisers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightspan.core.batches import batch_type_of, inputs_in
from lightspan.core.devices import wide_type
from lightspan.core.distributed import mean_over_ranks, register_replicated, world_size
from lightspan.core.errors import UserError, one_line
from lightspan.nn.image_numbers import keep_on_host, require_places, require_room, training_images
from lightspan.nn.labels import require_labelled, require_labels
from lightspan.nn.sequences.texts import require_known_tokens
from lightspan.nn.tokens import Tokens, token_features
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.schedules import ScheduleCallable
from lightspan.optim.steps import steps_taken
from lightspan.training.strategies import require_whole, shard
from lightspan.training.wiring.optimizers import wire

NAMED_DIFFERENCES = 3
"""Of weights that do not fit, in one message."""


class Method(LightningModule):
    """Knows how a method is optimised; a subclass writes its `training_step` and, if probes cannot read its
    `backbone`, `features`.

    A subclass takes the arguments below as `**optimization: Any` and passes them on; recipes set them like its own.

    Args:
        optimizer: called with the parameter groups. The recipe binds lr and every other setting.
        lr_scheduler: called with the optimiser and the run's number of optimiser steps; stepped after each of them.
        groups: which parameters train together; see `lightspan.optim.groups`.

    Attributes:
        batch_type: the type of its batches, for data that do not declare it; see `lightspan.core.batches`.
        num_classes: set by a method whose batches have a `label` in [0, num_classes): any other label is refused
            before its batch goes to the device, where it would crash a kernel. None refuses nothing.
        learns_from_labels: whether training reads `label`, as that of a method with `num_classes` does anyway. Data
            that have found no labels are then refused before the first step.
        num_images: set by a method that has a place for each training image, whose numbers lie in [0, num_images): data
            with more images, and an image with another number, are refused in the same way. None refuses nothing.
        num_tokens: set by a method whose network knows so many tokens: texts with another number are refused in the
            same way. None refuses nothing.
        least_rows: how many rows of all ranks the loss has to see at a time to have a gradient at all: 2 for a method
            that does nothing but tell rows apart. Data whose batches are smaller are refused before the first step; a
            smaller batch of them, such as the last, trains nothing.
        keeps_apart: what holds embeddings of different samples apart in a method that compares them, as a clause with
            its settings, such as "its negatives are many (batch_size) and its temperature fits"; the collapse
            sentinel's advice is to see to that. Empty for a method that compares none.
    """

    batch_type: type | None = None
    least_rows: int = 1
    num_classes: int | None = None
    learns_from_labels: bool = False
    num_images: int | None = None
    num_tokens: int | None = None
    keeps_apart: str = ""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: ScheduleCallable | None = None,
        groups: ParameterGroups | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.groups = groups or ParameterGroups()

    def setup(self, stage: str) -> None:
        """Raises: UserError for data with more training images than `num_images`, batches below `least_rows`, a
        single training sample where a method tells samples apart, or no labels where it learns from them.
        """
        if stage == "fit" and (self.learns_from_labels or self.num_classes is not None):
            data = getattr(self.trainer, "datamodule", None)
            require_labelled(data, type(self).__name__, "take a method that learns without labels")
        if stage == "fit" and self.least_rows > 1:
            self._require_batches()
        if stage == "fit" and (self.least_rows > 1 or self.keeps_apart):
            self._require_several_samples()
        if stage == "fit" and self.num_images is not None:
            require_room(getattr(self.trainer, "datamodule", None), self.num_images, type(self).__name__)

    def _require_batches(self) -> None:
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        parts = self.trainer.accumulate_grad_batches
        if isinstance(batch_size, int) and batch_size < self.least_rows * parts:
            method = type(self).__name__
            at_a_time = f" in accumulate_grad_batches={parts} parts" if parts > 1 else ""
            raise UserError(
                f"data.init_args.batch_size={batch_size}{at_a_time} leaves {method} nothing to tell apart: its loss "
                f"compares {self.least_rows} rows or more; set batch_size to {self.least_rows * parts} or more"
            )

    def _require_several_samples(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if training_images(data) == 1:
            way_out = getattr(data, "more_samples", "give more of them")
            raise UserError(
                f"the data have 1 sample to train on, and {type(self).__name__} tells 2 or more apart; {way_out}"
            )

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Raises: UserError for labels that are not below `num_classes`, tokens that are not below `num_tokens`, and in
        training for images whose numbers are not below `num_images`.
        """
        # Not Lightning's public hook, which it would take away from data modules that have one, with a warning.
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if self.num_classes is not None and isinstance(batch, Mapping) and "label" in batch:
            require_labels(batch["label"], self.num_classes, self)
        if self.num_tokens is not None:
            require_known_tokens(batch, self.num_tokens, type(self).__name__)
        if self.num_images is not None and self._trainer is not None and self._trainer.training:
            require_places(batch, self.num_images, type(self).__name__)
        return batch

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Lightning's, after which `lightspan.nn.image_numbers` reads the batch's `index` on the host."""
        moved = super()._apply_batch_transfer_handler(batch, device, dataloader_idx)
        if (device or self.device).type != "cpu":  # there a batch stays where it is
            keep_on_host(batch, moved)
        return moved

    def features(self, batch: Any) -> Tensor:
        """What probes read, float [B, D], before any projector: `backbone` of what a network reads of a batch, as its
        type declares it (`lightspan.core.batches`), of views the first.

        A method whose backbone has another name or reads something else overrides it.

        Raises: UserError if it does not, and has no backbone, or a batch has nothing to read.
        """
        backbone = getattr(self, "backbone", None)
        read = inputs_in(batch, self.read_type) if isinstance(batch, Mapping) else ()
        if not isinstance(backbone, nn.Module) or not read:
            raise UserError(
                f"{type(self).__name__} defines no features(batch), which probes need; add it or remove the probe"
            )
        return backbone(*read)

    @property
    def read_type(self) -> type | None:
        """The declared type of the batches: that of the data module, or where it declares none, the method's own."""
        return batch_type_of(getattr(self._trainer, "datamodule", None), self)

    def embeddings(self, batch: Any) -> Tensor:
        """What the loss compares, float [B, P], where collapse shows first: the features through `projector` if a
        method has one, else the features. The collapse sentinel reads it.

        A method whose head has another name gives it as a property `projector`, and one that compares something else
        overrides this. One with prototypes may also define `assignments(batch)` -> [B, K], rows >= 0: to which
        prototypes its samples belong, without gradients, and before Sinkhorn-Knopp, which hides collapse.
        """
        features_BD = self.features(batch)
        return features_BD if self.compares_features else self.projector(features_BD)  # type: ignore[operator]

    @property
    def compares_features(self) -> bool:
        """Whether `embeddings` are the features themselves. The collapse sentinel then takes off what all samples'
        features share, such as the common part of mean-pooled tokens.
        """
        own = type(self).embeddings is not Method.embeddings
        return not own and not isinstance(getattr(self, "projector", None), nn.Module)

    def token_features(self, batch: Any, layers: Sequence[int] = (-1,)) -> list[Tokens]:
        """Features by layer and by token, read off `backbone` while `features` runs; see `lightspan.nn.tokens`.

        A method whose backbone has another name, or that reads another part, overrides it.

        Raises: UserError for a layer out of range, and if a method has no backbone or no features.
        """
        backbone = getattr(self, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise UserError(
                f"{type(self).__name__} has no backbone from which to read tokens; define token_features in it"
            )
        return token_features(backbone, lambda: self.features(batch), layers)

    @torch.compiler.disable  # the Trainer's records of what was logged are no part of a graph
    def log_training(self, figures: Mapping[str, Tensor], **options: Any) -> None:
        """Logs 0-d figures of a training step, which are the same on all ranks: means over them.

        Several ranks exchange figures, all in one collective, and log them only in the steps that loggers record
        (`trainer.log_every_n_steps`). With Lightning's `sync_dist=True` every rank would wait for all others once per
        figure in every step.

        Args:
            options: further arguments of `log_dict`.
        """
        if world_size() > 1:
            if not self._writes_this_step():
                return
            wide = wide_type(*(figure.dtype for figure in figures.values()))
            means = torch.stack([figure.detach().to(wide) for figure in figures.values()])
            mean_over_ranks([means])
            figures = dict(zip(figures, means.unbind(), strict=True))
        self.log_dict(dict(figures), **options)

    def _writes_this_step(self) -> bool:
        """Whether loggers are due, as Lightning counts; the same on all ranks, whatever else makes one of them log."""
        trainer: Any = self._trainer
        if trainer is None or not trainer.log_every_n_steps:
            return False
        return (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % trainer.log_every_n_steps == 0

    @torch.compiler.disable  # its number changes with each step, and a graph would be made for each
    def share_of_run(self, ahead: int = 0) -> float:
        """Optimiser steps done over those of the whole run, in [0, 1]: for schedules of momenta, temperatures, weights.
        0 without a Trainer.

        Args:
            ahead: that so many steps later.
        Raises: UserError for a run without an end.
        """
        return 0.0 if self._trainer is None else min((self.global_step + ahead) / self._total_steps(), 1.0)

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("a schedule needs the run's length; set trainer.max_steps or trainer.max_epochs")
        return int(total)

    def after_optimizer_step(self) -> None:
        """For what follows a step of the optimiser: an EMA teacher, a mask, a proximal step. Does nothing by default.

        Called without gradients once after each step that moved the weights, before anything of it is logged or saved:
        neither while gradients are accumulated, nor after a step that was skipped (`lightspan.optim.steps`). Sharded
        weights are those of this rank. With manual optimisation, a method calls it itself.

        `global_step` is still the number of this step, counted from 0, as it was in its `training_step`: the Trainer
        counts a step when this has returned. `share_of_run` too is that at the beginning of the step.
        """

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        taken = steps_taken(optimizer)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if steps_taken(optimizer) > taken:
            with torch.no_grad():
                self.after_optimizer_step()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """That of torch. Raises: UserError for weights of other parts or widths, which it names."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            first, *differences = str(error).splitlines()
            named = "; ".join(" ".join(line.split()).rstrip(".") for line in differences[:NAMED_DIFFERENCES]) or first
            more = len(differences) - NAMED_DIFFERENCES
            raise UserError(
                f"these weights are of another {type(self).__name__} than this one: {one_line(named)}"
                + (f", and {more} more" if more > 0 else "")
                + "; build it with the settings of the run that they come from, which are in its resolved.yaml"
            ) from error

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs nothing: probes watch a method whose loss is not worth validating. Others log `val/...` here."""

    def require_whole(self, why: str) -> None:
        """For the `configure_model` of a method that writes within whole parameters.

        Args:
            why: what it does, such as "moves coordinates within whole parameters".
        Raises: UserError under a strategy that splits them.
        """
        require_whole(self, why)

    def configure_model(self) -> None:
        """Shards the method if the strategy asks for it; see `lightspan.training.strategies`."""
        shard(self)

    def run_schedule(self) -> ScheduleCallable | None:
        """The schedule of the whole run: the given one. A method of several stages puts it together of theirs."""
        return self.lr_scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.groups.optimizer(self, self.optimizer)
        wire(self.trainer, self, [optimizer])
        if (schedule := self.run_schedule()) is None:
            return optimizer
        scheduler = schedule(optimizer, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class BetweenEpochs(Method):
    """A method that does something between epochs, such as clustering the data: `enter`, once as each epoch begins.

    A run that resumes within an epoch does not enter it again: the buffer `begun` knows.
    """

    begun: Tensor

    def __init__(self, **optimization: Any) -> None:
        super().__init__(**optimization)
        register_replicated(self, "begun", torch.tensor(-1))  # the epoch
        self._entered = -1  # the same; spares a question to the device in each step

    def enter(self, epoch: int) -> None:
        """What happens as an epoch begins, counted from 0; without gradients."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.begin(self.current_epoch)

    @torch.no_grad()
    def begin(self, epoch: int) -> None:
        """Enters an epoch, unless that has happened. Whoever needs to know what comes of it may call this earlier, such
        as a loader that orders the data by it.
        """
        if epoch <= self._entered:
            return
        self._entered = epoch
        if epoch > int(self.begun):
            self.begun.fill_(epoch)
            self.enter(epoch)
