"""Steps of a world that is played when a run starts and kept in memory: for worlds that take seconds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import BYTES
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.worlds.steps import Recorded, StepDecoding, require_step_settings


@dataclass(frozen=True)
class PlayedSamples:
    """Steps as they would be written into a shard.

    Args:
        members: of each step, by the name of the member.
        decode: makes their fields.
    """

    members: Sequence[dict[str, Any]]
    decode: StepDecoding

    @property
    def batch_type(self) -> type:
        return self.decode.batch_type

    def __len__(self) -> int:
        return len(self.members)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        return self.decode(self.members[index], seed) | {"index": index}


class PlayedSteps(SampleSets):
    """Batches are `StepBatch`, or `ControlBatch` for vectors of numbers, as those of
    `lightspan.datamodules.worlds.steps.StepShards` are of what `record` wrote of the same worlds. Each rank plays both
    worlds to their end before the first step, with the same result: 350 steps of BabyAI take a second.

    Args:
        world: gives the training samples, such as `lightspan.datamodules.worlds.babyai.Demonstrations`.
        val_world: those of validation; of another seed.
        actions, view, share_views, missions: as in `StepShards`.
        mean, std: of the image's channels in [0, 1], for standardising.
        batch_size: samples of one optimiser step over all ranks.
        seed: of the order and of the views.
        num_workers: processes that make batches.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
    Raises: UserError as the worlds; for actions out of their space; for worlds of equal settings, which would validate
        on what was trained on.
    """

    def __init__(
        self,
        world: Recorded,
        val_world: Recorded,
        actions: int | None = 7,
        view: Views | None = None,
        share_views: bool = True,
        missions: bool = False,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("(0, inf)", std=std)
        require_step_settings("PlayedSteps", actions, view)
        if world == val_world:
            raise UserError("PlayedSteps: world and val_world are the same; give val_world another seed")
        self.worlds = world, val_world
        mean_C11, std_C11 = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        standard = ImageFields(mean_C11, std_C11, view)
        self.decode = StepDecoding({"image": "png"}, None, standard, actions, share_views, missions, truth=False)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Black and white after standardising, each [3, 1, 1]."""
        image = self.decode.image
        return -image.mean / image.std, (1 - image.mean) / image.std

    @property
    def batch_type(self) -> type:
        return self.decode.batch_type

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        played = [_played(world) for world in self.worlds]
        plain = self.decode.plain()
        self.bank, self.val = PlayedSamples(played[0], plain), PlayedSamples(played[1], plain)
        self.train = PlayedSamples(played[0], self.decode)
        tasks = ", ".join(f"{len(world.tasks)} for {name}" for name, world in zip(NAMES, self.worlds, strict=True))
        say(f"worlds: {len(self.train)} steps for training and {len(self.val)} for validation; tasks: {tasks}")


NAMES = "training", "validation"


def _played(world: Recorded) -> list[dict[str, Any]]:
    silent = not sys.stdout.isatty()
    steps: list[dict[str, Any]] = []
    taken = 0
    for members in track(world.samples(), "playing", transient=True, disable=silent, total=None):
        taken += sum(len(content) for content in members.values() if isinstance(content, bytes))
        if taken > BYTES.most:
            raise UserError(
                f"the first {len(steps):,} steps of {type(world).__name__} take more than {BYTES.most:,} bytes of "
                f"memory; play fewer, or raise the limit with {BYTES.setting} in the environment"
            )
        key = next(iter(members)).partition(".")[0]
        names = {name.partition(".")[2]: content for name, content in members.items()}
        steps.append({"__url__": type(world).__name__, "__key__": key, **names})
    return steps
