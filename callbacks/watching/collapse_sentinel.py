"""Do embeddings collapse? Watched while a run trains, with the likely cause and the way out.

Shapes: N held samples, Q views of each, P width of embeddings, K prototypes.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.collapse_signs import APART, TARGETS, Judge
from lightspan.callbacks.watching.detached import (
    at_full_length,
    detached,
    ends_with_epoch,
    features_of,
    log_now,
    steps_of_run,
)
from lightspan.callbacks.watching.held_samples import HeldSamples, single_views
from lightspan.callbacks.watching.run_warnings import record, warn
from lightspan.callbacks.watching.sound_state import SoundState
from lightspan.core.distributed import agreed
from lightspan.core.errors import UserError
from lightspan.evaluation.geometry.collapse import (
    alignment,
    dead_dimensions,
    duplicates,
    length,
    lidar,
    prototype_use,
    rankme,
    spread,
    uniformity,
)
from lightspan.evaluation.geometry.spectra import centred

ONLY_JUDGED = ("width", "equal_samples")
"""Figures that do not change during a run, and are not logged."""
LONGEST = 50
"""Optimiser steps between two measurements of a long run."""
MEASUREMENTS = 10
"""The fewest of a run with as many steps, besides the first: enough for a sign to show `patience` times."""
STEADY = 20
"""Optimiser steps over which a sign shows before it counts, where the run's length sets their distance: in its first
steps a network may narrow before it spreads.
"""


class CollapseSentinel(Callback):
    """Measures embeddings of a few held training samples every few steps, and warns when they collapse.

    For any LightningModule with `embeddings(batch)` -> float [B P], what its loss compares (`Method` has it), or else
    with `features(batch)`; and any datamodule. Of batches with `views`, each view of the first one's size is embedded
    by itself, so that views are grouped by sample. Needs no labels.

    Where embeddings are the features themselves, nothing has been made to be compared: features of sound networks may
    have a large common part, so directions are those of the features minus their mean. That is so if the module's
    `compares_features` says it (`Method` has it), or if it has no `embeddings`. What a method has to hold samples apart
    is said by its `keeps_apart`; advice names that.

    Logs collapse/rankme, collapse/uniformity, collapse/spread, collapse/dead_dimensions, collapse/duplicates,
    collapse/length (mean length of embeddings); with two views and more collapse/lidar and collapse/alignment; for a
    module with `assignments(batch)` -> [B K], rows >= 0, collapse/prototypes_in_use and collapse/prototypes_a_sample
    (see `lightspan.evaluation.geometry.collapse`); and collapse/signs, how many signs of collapse have shown `patience`
    times in succession (see `collapse_signs`). `lightspan report` draws them all, and shows the warnings, which are
    also in metrics.jsonl and summary.json.

    Training is not affected unless it acts: weights, moments, random states and the order of the data are bit for bit
    what they are without it. With several ranks all measure the same samples, and act by the first rank's figures.

    Args:
        every_n_steps: optimiser steps between two measurements, >= 1; None is a tenth of the run, at most 50, and then
            a sign counts once it has also shown for 20 steps, or to the end. The first is made before the first step,
            and the last at the end of the run. Where a run ends before its planned length, figures are logged and not
            judged, since it may go on later.
        samples: held over all ranks, >= 2, each with its views, in CPU memory. No rank can exceed their number.
        patience: measurements in succession that must show a sign before it counts, >= 1.
        action: "warn"; "stop" ends the run with an error; "roll_back" returns weights and optimiser state to the last
            measurement without a sign, which is kept in CPU memory, and goes on with the next data and `rate` times the
            learning rate. What a module keeps outside of its state_dict, and other callbacks' state, is not rolled
            back.
        rate: factor of the learning rates at each roll back, in (0, 1].
        most_roll_backs: of this run, resumes included, >= 1; the next collapse stops it.
    Raises: UserError for settings out of range, and before the first step for a module without embeddings, or a run
        without a datamodule; with "stop", and after the last roll back, for a collapse.
    """

    alters_training = False  # of a run that does not collapse; see config.identity

    def __init__(
        self,
        every_n_steps: int | None = None,
        samples: int = 512,
        patience: int = 2,
        action: Literal["warn", "stop", "roll_back"] = "warn",
        rate: float = 0.5,
        most_roll_backs: int = 2,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", 1 if every_n_steps is None else every_n_steps, 1),
            ("samples", samples, 2),
            ("patience", patience, 1),
            ("most_roll_backs", most_roll_backs, 1),
        ):
            if value < least:
                raise UserError(f"CollapseSentinel {name}={value} must be at least {least}")
        if action not in ("warn", "stop", "roll_back"):
            raise UserError(f"CollapseSentinel action={action!r} must be 'warn', 'stop' or 'roll_back'")
        if not 0 < rate <= 1:
            raise UserError(f"CollapseSentinel rate={rate} must be above 0 and at most 1")
        self.every_n_steps, self.samples, self.action = every_n_steps, samples, action
        self.rate, self.most_roll_backs = rate, most_roll_backs
        self.judge = Judge(patience)
        self.roll_backs = 0
        self.sound_step: int | None = None  # the last one whose measurement showed no sign
        self.measured: int | None = None  # the last step that was judged
        self._steps, self._every, self._equal_samples = math.inf, LONGEST, 0.0
        self._held: HeldSamples | None = None
        self._sound: SoundState | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not callable(getattr(pl_module, "embeddings", getattr(pl_module, "features", None))):
            raise UserError(
                f"{type(pl_module).__name__} has neither embeddings(batch) nor features(batch), which CollapseSentinel "
                "reads; add one that returns float [B, D], or remove the callback"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held = HeldSamples(trainer, pl_module, self.samples)
        self._sound = None
        self._steps = steps_of_run(trainer)
        self._every = self.every_n_steps or int(max(1, min(LONGEST * MEASUREMENTS, self._steps) // MEASUREMENTS))
        with detached(pl_module):
            complaints, self._equal_samples = self._held.complaints(trainer, pl_module)
        if not self.judge.first:
            self._say(trainer, complaints)
            self._measure(trainer, pl_module, partial(log_now, trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The latter inside an accumulation.
        if trainer.global_step % self._every == 0 and trainer.global_step != self.measured:
            self._measure(trainer, pl_module, partial(log_now, trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not ends_with_epoch(trainer) or trainer.global_step == self.measured:
            return
        log = partial(pl_module.log_dict, batch_size=1, sync_dist=trainer.world_size > 1)
        if at_full_length(trainer):
            self._measure(trainer, pl_module, log)
        else:  # a measurement out of turn would count among those that `patience` wants, if the run goes on
            with detached(pl_module):
                log(self._logged(self._figures(trainer, pl_module)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held = self._sound = None

    def state_dict(self) -> dict[str, Any]:
        counts = {"roll_backs": self.roll_backs, "sound_step": self.sound_step, "measured": self.measured}
        return {"judge": self.judge.state_dict(), **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.judge.load_state_dict(state_dict["judge"])
        self.roll_backs, self.sound_step = state_dict["roll_backs"], state_dict["sound_step"]
        self.measured = state_dict["measured"]

    def _measure(self, trainer: Trainer, module: LightningModule, log: Callable[[Mapping[str, float]], None]) -> None:
        self.measured = trainer.global_step
        with detached(module):
            figures = self._figures(trainer, module)
        apart = getattr(module, "keeps_apart", "") or (TARGETS if _of_features(module) else APART)
        waits = self.every_n_steps is None and trainer.global_step < self._steps  # at the end, what shows will stay
        said = self.judge.look(figures, apart, least=-(-STEADY // self._every) if waits else 0)
        log(self._logged(figures))
        if self.judge.sound:
            self.sound_step = trainer.global_step
            if self.action == "roll_back":
                self._sound = SoundState(trainer, module)
        if not said:
            return
        if self.action == "warn":
            self._say(trainer, said)
        elif self.action == "roll_back" and self._sound is not None and self.roll_backs < self.most_roll_backs:
            self.roll_backs += 1
            self._sound.restore(trainer, module, self.rate)
            self.judge.start_anew()
            went = f"went back to step {self.sound_step}'s weights, learning rates are {self.rate} times those of then"
            self._say(
                trainer, [f"{one}. Roll back {self.roll_backs} of {self.most_roll_backs}: {went}" for one in said]
            )
        else:
            for one in said:
                record(trainer, self._text(trainer, one))
            raise UserError(f"step {trainer.global_step}: {said[0]}. {self._way_back(trainer)}")

    def _logged(self, figures: dict[str, float]) -> dict[str, float]:
        named = {f"collapse/{name}": value for name, value in figures.items() if name not in ONLY_JUDGED}
        return named | {"collapse/signs": float(self.judge.collapsed)}

    def _figures(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """The same on every rank, which is that of the first one."""
        assert self._held is not None
        name = "embeddings" if hasattr(module, "embeddings") else "features"
        kind = self._held.batch_type

        def embedded(batch: Any) -> Tensor:
            return torch.stack([features_of(trainer, module, one, name) for one in single_views(batch, kind)], dim=1)

        x_NQP = self._held.of_all(trainer, module, embedded)
        figures = {"length": length(x_NQP[:, 0]), "dead_dimensions": dead_dimensions(x_NQP[:, 0])}
        x_NP = centred(x_NQP[:, 0]) if _of_features(module) else x_NQP[:, 0]
        figures |= {
            "rankme": rankme(x_NP),
            "uniformity": uniformity(x_NP),
            "spread": spread(x_NP),
            "duplicates": duplicates(x_NP),
            "width": float(x_NP.shape[1]),
            "equal_samples": self._equal_samples,
        }
        if x_NQP.shape[1] > 1:
            figures |= {"lidar": lidar(x_NQP), "alignment": alignment(x_NQP)}
        if hasattr(module, "assignments"):
            first = self._held.of_all(
                trainer, module, lambda b: features_of(trainer, module, next(single_views(b, kind)), "assignments")
            )
            figures["prototypes_in_use"], figures["prototypes_a_sample"] = prototype_use(first)
        values = agreed(torch.tensor(list(figures.values()), device=module.device)).tolist()
        return dict(zip(figures, values, strict=True))

    def _say(self, trainer: Trainer, said: list[str]) -> None:
        for one in said:
            warn(trainer, self._text(trainer, one))

    def _text(self, trainer: Trainer, said: str) -> str:
        return f"CollapseSentinel, step {trainer.global_step}: {said}"

    def _way_back(self, trainer: Trainer) -> str:
        if self.sound_step is None:
            return "No measurement was without a sign"
        files = [
            path
            for callback in trainer.checkpoint_callbacks
            if (folder := getattr(callback, "dirpath", None))
            for path in Path(folder).glob("*.ckpt")
            if (step := re.search(r"step=(\d+)", path.name)) and int(step[1]) <= self.sound_step
        ]
        newest = max(files, key=lambda path: int(re.search(r"step=(\d+)", path.name)[1]), default=None)  # type: ignore[index]
        from_there = f"; {newest} is from before the fall" if newest else "; no checkpoint is as old"
        return f"The last measurement without a sign was that of step {self.sound_step}{from_there}"


def _of_features(module: LightningModule) -> bool:
    """Whether what is compared are features, with no head that was made for it."""
    return getattr(module, "compares_features", not hasattr(module, "embeddings"))
