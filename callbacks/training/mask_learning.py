"""One line that trains any LightningModule with few of its weights, and learns which."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from lightspan.callbacks.training.mask_demands import (
    early_choices,
    masks_file,
    refuse_early_averages,
    refuse_scaled_gradients,
    require_maskable,
)
from lightspan.callbacks.training.mask_files import FILE, announce, save_masks, say_what_stays
from lightspan.callbacks.training.weights_in_use import WeightsInUse
from lightspan.callbacks.watching.run_warnings import warn
from lightspan.core.devices import wide
from lightspan.core.errors import UserError, print_notes
from lightspan.core.files.places import RunPath
from lightspan.core.patterns import matches, require_matches, require_patterns
from lightspan.core.sharded import local
from lightspan.optim.masks.follow import keep_only, require_entrywise
from lightspan.optim.masks.learner import Fixed, MaskLearner, on_cpu
from lightspan.optim.masks.place import Place
from lightspan.optim.steps import steps_taken
from lightspan.subspaces.masks.allocation import Allocation, Uniform
from lightspan.subspaces.masks.schedules import Schedule, schedule_of
from lightspan.subspaces.masks.top_k import require_density


class MaskLearning(Callback):
    """Trainer(callbacks=[MaskLearning(["net.*.weight"], DropAndGrow(), density=0.1)]): of the matched weights a tenth
    trains, and is used.

    The module, its optimiser and its state_dict stay what they are. While a mask is soft, or closed weights keep their
    values, the weights in use stand in the parameters from the start of a training batch to the end of its backward
    pass, and while the module is validated; at all other times, and in checkpoints, the weights themselves do. Whoever
    validates, tests or predicts with such a checkpoint and this callback gets the weights in use as well.
    Gradients go back through the mask before they are clipped, once all micro-batches have added to them. After the
    share `until` of the run's steps the mask is fixed at exactly the density's last value, the weights outside of it
    become zero and stay so, and what is left trains on: what the run ends with are plain weights.

    Masks are functions of the weights, the seed and the step, the same on every number of ranks up to the rounding of
    gradients, and bit for bit in a resumed run. Where a mask closes an entry, the optimiser's moments of it vanish. A
    `LowRank` (also by SubspaceProjection) keeps its moments, which belong to coordinates, and its steps are cut to the
    mask. Parameters of adapters can be matched; those that are frozen cannot.

    Logs mask/density (the share of open entries, or its expectation), mask/churn (the share of the open entries that
    were closed at the last line), and for each tensor mask/density/NAME. When fitting ends, the masks go to a
    safetensors file, by the names of the state_dict and open for every tensor that has none, which
    `lightspan.merging.arithmetic.StoredMask` reads.

    Args:
        match: shell-style patterns of the names of parameters that train.
        mask: how it is learned: one of `lightspan.optim.masks`.
        density: share of open entries, in (0, 1], or its schedule over the time for learning.
        allocation: how tensors share it.
        until: share of the run after which the mask is fixed, in (0, 1].
        seed: of random masks and draws.
        path: of the file of masks; None puts it as masks.safetensors into the Trainer's default_root_dir.
    Attributes:
        masks: whole, bool, by parameter; once the mask is fixed.
    Raises: UserError for values out of range; when fitting starts for patterns without a match, for manual
    optimisation, for parameters, strategies and optimisers whose weights or state cannot follow a mask, for averages of
    weights that begin before the mask is fixed, and for a run without an end.
    """

    prepares_optimizers = True  # on_fit_start only judges and says what will be masked, so a plan may call it

    def __init__(
        self,
        match: list[str],
        mask: MaskLearner,
        density: float | Schedule = 0.1,
        allocation: Allocation | None = None,
        until: float = 0.75,
        seed: int = 0,
        path: RunPath | None = None,
    ) -> None:
        require_patterns(match, "MaskLearning match")
        if not match:
            raise UserError(f"MaskLearning match={match!r} must be a list of patterns, such as ['*.weight']")
        if not isinstance(mask, MaskLearner):
            raise UserError(f"MaskLearning mask={mask!r} must be a MaskLearner, such as ByScore()")
        self.match, self.mask, self.density = match, mask, schedule_of(density)
        for value in self.density.ends():
            require_density(value, "MaskLearning density")
        if not 0 < until <= 1:
            raise UserError(f"MaskLearning until={until} is a share of the run and must lie in (0, 1]")
        self.allocation, self.until, self.seed, self.path = allocation or Uniform(), until, seed, path
        self.masks: dict[str, Tensor] = {}
        self._now: MaskLearner | None = None  # `mask`, then `Fixed`
        self._stored: Mapping[str, Any] = {}
        self._in_use: WeightsInUse | None = None
        self._handle: Any = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(match=self.match)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._now, self.masks = None, {}
        if not pl_module.automatic_optimization:
            raise UserError(
                f"MaskLearning draws a mask for each optimiser step, and {type(pl_module).__name__} steps by hand; set "
                "automatic_optimization=True"
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise UserError(
                f"MaskLearning needs parameters with a shape, and {type(trainer.strategy).__name__} lays them end to "
                "end; train with --config scale/fsdp2 or scale/ddp"
            )
        names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        sizes = {n: p.numel() for n, p in pl_module.named_parameters() if p.requires_grad and p.ndim > 1}
        require_matches(self.match, names, f"parameter of {type(pl_module).__name__} that trains", sizes=sizes)
        file = self._file(trainer)
        require_maskable(pl_module, [name for name in names if matches(name, self.match)])
        others = [c for c in trainer.callbacks if isinstance(c, MaskLearning) and c is not self]  # type: ignore[attr-defined]
        for other in others:
            if twice := [name for name in names if matches(name, self.match) and matches(name, other.match)]:
                raise UserError(f"two entries of MaskLearning match {twice[0]}; give each parameter one mask")
            if self.path == other.path:
                raise UserError(f"two entries of MaskLearning write to path={self.path}; give each a path of its own")
        if trainer.is_global_zero:
            trained = {
                n: p.shape for n, p in pl_module.named_parameters() if p.requires_grad and matches(n, self.match)
            }
            say_what_stays(trained, self.allocation, self.density.ends()[1])
            if file.exists() and trainer.ckpt_path is None:
                way_out = "give MaskLearning another path to keep it"
                print_notes([f"{file} is of an earlier run, and will be replaced when this one ends; {way_out}"])

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers  # automatic optimisation has one
        if not optimizer.param_groups:
            raise UserError(
                f"MaskLearning needs an optimiser, and configure_optimizers of {type(pl_module).__name__} gives none"
            )
        require_entrywise(optimizer)
        refuse_scaled_gradients(trainer, optimizer)
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("MaskLearning needs the run's length; set trainer.max_steps or trainer.max_epochs")
        self._learning_steps = max(1, round(self.until * int(steps)))
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._places = self._matched(pl_module)
        self._numbers = {name: place.shape.numel() for name, place in self._places.items()}
        if left_out := [name for name, place in self._places.items() if id(place.parameter) not in held]:
            raise UserError(f"MaskLearning matches {left_out[0]}, which the optimiser does not train; leave it out")
        stored, self._stored = self._taken_up(), {}
        self._begin(Fixed() if stored.get("fixed") else self.mask, optimizer, stored.get("learner"))
        if stored.get("fixed"):
            self.masks = on_cpu(self._learner.chosen(1.0))
        else:
            refuse_early_averages(trainer, self._learning_steps)
            if trainer.is_global_zero and not self._learner.sparse:
                print_notes(early_choices(trainer, self._learning_steps))
        self._last = self._learner.saved(stored, "last") if stored.get("last") else {}
        self._figures = dict(stored.get("figures") or {})
        self._counts: dict[str, float] = {}
        self._taken = steps_taken(optimizer)  # first, so that steps are counted when the hook asks
        # Inside the step: whoever writes a checkpoint after it finds weights and masks of one moment.
        self._handle = optimizer.register_step_post_hook(partial(self._after_step, trainer))
        self._in_use = WeightsInUse(pl_module, self._places)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = self._learner
        now.draw(trainer.global_step, self._progress(trainer.global_step))
        if not now.sparse:
            self._weights.put(now.factor)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights.back()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for name, place in self._places.items():
            if place.parameter.grad is not None:
                gradient_S = local(place.parameter.grad)
                gradient_S.copy_(self._learner.pull(name, wide(gradient_S)))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._weights.back()  # of a step without a backward pass
        if self._counts:
            each = {f"mask/density/{name}": count / max(self._numbers[name], 1) for name, count in self._counts.items()}
            for logger in trainer.loggers:  # to the loggers alone: a figure a tensor would drown the summary of a run
                logger.log_metrics(each, step=trainer.global_step - 1)
            self._counts = {}
        # In every step what was found at the last line, so that a resumed run has the figures of a straight one.
        pl_module.log_dict(self._figures, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._begin_evaluation(pl_module)
        elif self._now is not None and not self._now.sparse:
            self._weights.put(self._now.mean_factor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._let_go()
        elif self._in_use is not None:
            self._in_use.back()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.masks:  # the run ended before its time
            self._fix(trainer.optimizers[0])
            warn(
                trainer,
                f"the run ended after step {trainer.global_step}, and MaskLearning would have fixed its masks after "
                f"step {self._learning_steps}: the weights are masked now, but checkpoints hold all of them, so that "
                "they can continue. To mask one use lightspan.merging.masked.Masked with the file of masks",
            )
        self._let_go()
        path = self._file(trainer)
        if trainer.is_global_zero:
            save_masks(path, pl_module, self.masks)
        announce(path, self.masks)

    def state_dict(self) -> dict[str, Any]:
        if self._now is None:
            return dict(self._stored)
        kind = type(self.mask).__name__
        state = {"fixed": bool(self.masks), "kind": kind, "learner": self._now.state_dict()}
        return {**state, "last": on_cpu(self._now.wholes(self._last)), "figures": dict(self._figures)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        stored = [key for key in checkpoint.get("callbacks", {}) if key.startswith(f"{type(self).__qualname__}{{")]
        if trainer.training and stored and self.state_key not in stored:
            raise UserError(
                f"the checkpoint is of {stored[0]}, this run has {self.state_key}; resume with the match of that run"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict  # taken up once the parameters are what they will be trained as

    def _file(self, trainer: Trainer) -> Path:
        return masks_file(self.path or Path(trainer.default_root_dir) / FILE)

    @property
    def _learner(self) -> MaskLearner:
        assert self._now is not None
        return self._now

    @torch.no_grad()
    def _after_step(self, trainer: Trainer, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        taken, step = steps_taken(optimizer), trainer.global_step + 1
        if taken == self._taken:  # it changed nothing
            return
        self._taken = taken
        if self._learner.update(step, self._progress(step)):
            self._forget(optimizer)
        self._cut()
        if step >= self._learning_steps and not self.masks:
            self._fix(optimizer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector of the trainer sets it
        if not self._figures or (every and step % every == 0):  # 0 logs nothing
            self._measure(step)

    @torch.no_grad()
    def _begin_evaluation(self, module: LightningModule) -> None:
        """Outside of a fit: a checkpoint from before the mask was fixed runs with the mask that validation in the fit
        would use. Weights of a later one are the masked ones.
        """
        if not self._stored and not self.masks:
            rank_zero_only(print_notes)(
                ["MaskLearning found no masks in what is evaluated, and evaluates the weights as they are"]
            )
        if not self._stored or self._stored.get("fixed"):
            return
        stored, self._places = self._taken_up(), self._matched(module)
        self.mask.begin(self._places, self.allocation, self.density, self.seed)
        self.mask.load_masks(stored["learner"])
        if not self.mask.sparse:
            self._in_use = WeightsInUse(module, self._places)
            self._in_use.put(self.mask.mean_factor)

    def _let_go(self) -> None:
        if self._in_use is not None:
            self._in_use.close()
        if self._handle is not None:
            self._handle.remove()
        self._in_use = self._handle = None

    @property
    def _weights(self) -> WeightsInUse:
        assert self._in_use is not None
        return self._in_use

    def _matched(self, module: LightningModule) -> dict[str, Place]:
        return {
            name: Place(name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and matches(name, self.match)
        }

    def _taken_up(self) -> Mapping[str, Any]:
        """The saved state. Raises: UserError for masks that another kind of learner made."""
        kinds = self._stored.get("kind"), type(self.mask).__name__
        if self._stored and not self._stored.get("fixed") and kinds[0] not in (None, kinds[1]):
            raise UserError(
                f"the saved masks are learned by {kinds[0]}, those of this run by {kinds[1]}; resume with the mask of "
                "MaskLearning of that run"
            )
        return self._stored

    def _progress(self, step: int) -> float:
        return min(step / self._learning_steps, 1.0)

    def _begin(self, learner: MaskLearner, optimizer: Optimizer, stored: Mapping[str, Any] | None = None) -> None:
        learner.begin(self._places, self.allocation, self.density, self.seed, optimizer)
        if stored is not None:
            learner.load_state_dict(stored)
        self._now = learner
        self._cut()

    def _fix(self, optimizer: Optimizer) -> None:
        """The mask as it is to stay, and the weights with it: from now on they are the masked ones."""
        chosen = self._learner.chosen(1.0)
        self.masks = on_cpu(chosen)
        self._weights.free()
        self._begin(Fixed(chosen), optimizer)
        self._forget(optimizer)

    def _forget(self, optimizer: Optimizer) -> None:
        for name, place in self._places.items():
            keep_only(optimizer, place.parameter, self._learner.factor(name))

    def _cut(self) -> None:
        """Weights outside of a mask that leaves nothing there become zero, whatever the optimiser did to them."""
        if self._learner.sparse:
            for name, place in self._places.items():
                place.weight.masked_fill_(~self._learner.factor(name), 0)

    def _measure(self, step: int) -> None:
        """Figures to log, and open entries of each tensor."""
        progress, self._counts = self._progress(step), self._learner.open_counts()
        before, self._last = self._last, self._learner.opened()
        opened = {name: mask & ~before[name] for name, mask in self._last.items() if name in before}
        now, new = (sum(self._learner.totals(masks).values()) for masks in (self._last, opened))
        figures = {
            "density": sum(self._counts.values()) / max(1, sum(self._numbers.values())),
            "churn": new / max(now, 1),
            **self.mask.figures(progress),
        }
        self._figures = {f"mask/{what}": value for what, value in figures.items()}
