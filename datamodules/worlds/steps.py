"""Steps of agents in tar shards: how they are recorded, such as by `lightspan.datamodules.worlds.babyai`, and read."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import default_collate

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.pixels import png_of_bytes
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.shards.decoders import decode_array, decode_fields, decode_image, decode_text, place_of
from lightspan.datamodules.shards.headers import UNDECODABLE
from lightspan.datamodules.shards.pack import pack
from lightspan.datamodules.shards.pack_sources import Members
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.worlds.batch import ControlBatch, StepBatch, WalkBatch

NOW, NEXT, ACTION, STATE, TASK, MISSION = "now.png", "next.png", "action.npy", "state.npy", "cls", "txt"
"""The members of a step."""
DEPTH, OBJECTS = "depth.npy", "objects.npy"
"""Further ones, of worlds that know them."""


class Recorded(ABC):
    """A world that can be recorded, or played (`lightspan.datamodules.worlds.played`).

    Attributes:
        tasks: their names so far; a sample's label is the place of its own.
    """

    tasks: list[str]

    @abstractmethod
    def samples(self) -> Iterator[Members]:
        """The members of each step, see `step_members`."""


def record(recorded: Recorded, out: Path, shard_bytes: int = 2**26) -> int:
    """Writes `out`, a new folder of shards for `StepShards`; its classes.json has the tasks. The same settings give the
    same bytes.

    Returns: how many steps there are.
    Raises: UserError as `recorded.samples` and `pack`.
    """
    written = pack(recorded.samples(), recorded.tasks, out, shard_bytes)
    return max(track(written, "recording steps", transient=True, total=None))


def step_members(key: str, frames: Iterable[np.ndarray], task: int, mission: str, **arrays: Any) -> Members:
    """A step as members of a shard.

    Args:
        frames: before the action and after it, uint8 [H W 3] each.
        arrays: `action` and `state`.
    """
    images = {name: png_of_bytes(frame) for name, frame in zip((NOW, NEXT), frames, strict=True)}
    numbers = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    members = {**images, **numbers, TASK: str(task).encode(), MISSION: mission.encode()}
    return {f"{key}.{name}": content for name, content in members.items()}


def npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


@dataclass(frozen=True)
class StepDecoding(Decoding):
    """The fields of a step.

    Args:
        actions: how many there are; None for vectors of numbers in [-1, 1].
        share_views: whether both images get the same view.
        missions: whether the text of the task is a field.
        truth: whether depth and objects are.
    """

    actions: int | None
    share_views: bool
    missions: bool
    truth: bool

    @property
    def batch_type(self) -> type:
        if self.truth:
            return WalkBatch
        return ControlBatch if self.actions is None else StepBatch

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        where = place_of(members)
        needed = (NOW, NEXT, ACTION, STATE, TASK, MISSION, *((DEPTH, OBJECTS) if self.truth else ()))
        if lacking := [name for name in needed if name not in members]:
            raise UserError(f"{where} has no .{lacking[0]} member; a step is written by lightspan.datamodules.worlds")
        try:
            frames = [self._resized(decode_image(members[name])) for name in (NOW, NEXT)]
            action, state = decode_array(members[ACTION]), decode_array(members[STATE])
            mission = decode_text(members[MISSION])
            truth = [decode_array(members[name]) for name in (DEPTH, OBJECTS) if self.truth]
        except UNDECODABLE as error:
            raise UserError(f"{where} cannot be decoded: {error}") from error
        if self.share_views:
            made = self.image(torch.stack(frames), seed)
            image, later = made["views"][0] if "views" in made else made["image"]
        else:
            both = [self.image(frame, 2 * seed + place) for place, frame in enumerate(frames)]
            image, later = (made["views"][0] if "views" in made else made["image"] for made in both)
        fields = {"image": image, "next_image": later, "action": self._action(action, where), "state": state.float()}
        fields |= {"mission": mission} if self.missions else {}
        fields |= {"depth": truth[0].float(), "objects": truth[1].long()} if self.truth else {}
        return fields | decode_fields(members, {"label": TASK})

    def _action(self, action: Tensor, where: str) -> Tensor:
        """Raises: UserError for one out of the action space."""
        if self.actions is None:
            if action.ndim != 1 or not action.is_floating_point() or not bool((action.abs() <= 1).all()):
                raise UserError(
                    f"{where} has the action {_shown(action)}, and each of its numbers must lie in [-1, 1]; scale "
                    "actions when they are recorded, or set data.init_args.actions to how many there are"
                )
            return action.float()
        if action.ndim or action.is_floating_point() or not 0 <= int(action) < self.actions:
            raise UserError(
                f"{where} has the action {_shown(action)}, and data.init_args.actions={self.actions} has those from 0 "
                f"to {self.actions - 1}; raise it, or set null for vectors of numbers in [-1, 1]"
            )
        return action.long()


def require_step_settings(data: str, actions: int | None, view: Views | None) -> None:
    """Raises: UserError, which begins with `data`, for settings of `StepShards` that cannot work."""
    if actions is not None and actions < 1:
        raise UserError(f"{data} actions={actions} must be at least 1, or null for vectors of numbers")
    if view is not None and (view.drawn is None or len(view.drawn.renderings) != 1):
        raise UserError(f"{data} view must be one that is drawn first, such as RandomViews with count=1")


def _shown(action: Tensor) -> str:
    return f"{action.flatten()[:8].tolist()} of shape {list(action.shape)}"


class StepShards(Shards):
    """Batches are `StepBatch`, or `ControlBatch` for vectors of numbers: what an agent saw, what it then did, and what
    it saw some steps later. Order, resume, damage and memory are those of `Shards`; a sample is a step.

    Args:
        shards, val_shards: as in `Shards`, written by `record`.
        actions: how many there are: 7 in MiniGrid and BabyAI, 3 of `lightspan.datamodules.worlds.doom`; None for
            vectors of numbers in [-1, 1].
        view: makes the one view of an image in training, of the kind that is drawn first, such as `RandomViews` with
            count=1; None leaves images as they are.
        share_views: whether both images of a step get the same view. With views of their own, a crop by itself looks
            like an action.
        missions: whether batches have `mission`, the text of each sample's task, as a list.
        truth: whether batches are `WalkBatch`, with the depth and the objects of the images, where the shards have
            these; not with a `view`.
        settings: `batch_size`, `image_size`, `mean`, `std`, `window`, `seed`, `num_workers` and the others of `Shards`
            but `fields`, `views` and `views_on`.

    Raises: UserError as `Shards`, and for an action that is out of the action space.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        actions: int | None = 7,
        view: Views | None = None,
        share_views: bool = True,
        missions: bool = False,
        truth: bool = False,
        **settings: Any,
    ) -> None:
        require_step_settings("StepShards", actions, view)
        if truth and (view is not None or actions is None):
            raise UserError(
                "StepShards truth has depth and objects of whole images and numbered actions; set view=null"
            )
        super().__init__(shards, val_shards, {"image": "png"}, views=view, **settings)
        self.decode = StepDecoding(
            **vars(self.decode), actions=actions, share_views=share_views, missions=missions, truth=truth
        )

    def stand_in(self) -> dict[str, Any] | None:
        """Two steps of black images of 64 x 64, where no shard is."""
        if not self.is_absent():
            return None
        action = np.int64(0) if self.batch_type is StepBatch else np.zeros(1, np.float32)
        black = np.zeros((64, 64, 3), np.uint8)
        members = step_members("", [black] * 2, 0, "", action=action, state=np.zeros(1, np.float32))
        sample = {"__url__": "none", "__key__": "none"} | {name[1:]: content for name, content in members.items()}
        return default_collate([self.decode(sample, seed=0) | {"index": torch.tensor(i)} for i in range(2)])
