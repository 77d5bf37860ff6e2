"""Which files belong to a checkpoint callback: the only ones that it ranks and removes."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightspan.training.checkpoints.content import described
from lightspan.training.checkpoints.manifest import SUFFIX, checkpoints, manifest

_NUMBER = r"[-+ ]?(?:[\d.,_]+(?:e[-+]?\d+)?%?|inf|nan)"  # as Python formats a number


class OwnFiles(ModelCheckpoint):
    """A ModelCheckpoint that takes no path from a checkpoint, only file names: the folder is always its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._there: frozenset[str] = frozenset()
        self._before_top_k: int | None = None

    def look(self, trainer: Trainer) -> None:
        """Records on all ranks what is in the folder now. Called before a checkpoint is loaded."""
        there = [path.name for path in checkpoints(Path(self.dirpath or ""))] if trainer.is_global_zero else []
        self._there = frozenset(trainer.strategy.broadcast(there))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "save_top_k": self.save_top_k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores which files are ranked, by their names. Names that are not there are dropped: those of another
        run, from whose checkpoint this one continues.
        """
        self._before_top_k = state_dict.get("save_top_k")
        self.current_score = state_dict.get("current_score")
        ranked = {self._own(path): score for path, score in (state_dict.get("best_k_models") or {}).items()}
        self.best_k_models = {path: score for path, score in ranked.items() if path}
        for path, score in self.best_k_models.items():
            if not (isinstance(score, Tensor) and score.ndim == 0):
                raise ValueError(f"the score of {Path(path).name} is {described(score)}, not a tensor of one number")
        self.last_model_path = self._own(state_dict.get("last_model_path"))
        self.best_model_path = self._own(state_dict.get("best_model_path"))
        self.best_model_score = state_dict.get("best_model_score") if self.best_model_path else None
        if self.best_k_models:
            best, worst = (min, max) if self.mode == "min" else (max, min)
            self.best_model_path = best(self.best_k_models, key=self.best_k_models.__getitem__)
            self.best_model_score = self.best_k_models[self.best_model_path]
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def may_remove(self, path: Path) -> bool:
        """Whether this callback can have ranked the file `path`: in its folder, with a name of its form."""
        here = path.parent.resolve() == Path(self.dirpath or "").resolve()
        return here and _pattern(self.filename or "").fullmatch(path.name) is not None

    def forgotten(self, trainer: Trainer, resumed: Path) -> list[Path]:
        """Files that a killed process had saved but had no time to remove, up to the step from which training
        continues.

        Empty if a different number of files was to be kept, or another callback keeps all of its files.
        """
        if self.save_top_k < 1 or self._before_top_k != self.save_top_k:
            return []
        kept = {resumed.name}
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback.save_top_k == -1:
                    return []
                kept |= {Path(path).name for path in (callback.best_model_path, *callback.best_k_models)}
        steps = {path: (manifest(path) or {}).get("step") for path in checkpoints(Path(self.dirpath or ""))}
        past = [path for path, step in steps.items() if type(step) is int and step <= trainer.global_step]
        return [path for path in past if path.name not in kept and self.may_remove(path)]

    def _own(self, path: str | None) -> str:
        name = Path(path or "").name
        return str(Path(self.dirpath or "") / name) if name in self._there else ""

    def _format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        # A metric called val/loss would put the file into a subfolder, where nothing looks for checkpoints.
        return super()._format_checkpoint_name(*args, **kwargs).replace("/", "_")


def _pattern(template: str) -> re.Pattern[str]:
    """The names of files that a template of ModelCheckpoint gives: `{step}` becomes `step=7`."""
    literal, *rest = re.split(r"\{([^{}:]*)(?::[^{}]*)?\}", template)
    parts = [re.escape(literal)]
    for metric, literal in zip(rest[::2], rest[1::2], strict=True):
        parts.append(f"{re.escape(metric)}={_NUMBER}{re.escape(literal)}")
    return re.compile("".join(parts).replace("/", "_") + re.escape(SUFFIX))
