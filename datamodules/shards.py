"""Streams samples from WebDataset tar shards, local or over https."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchvision.transforms.v2 import functional as F

from lightspan.datamodules.ranks import data_rank, micro_batch_size, pins_memory
from lightspan.datamodules.tars import check_fields, check_shard, decode_fields, expand_braces, read_samples
from lightspan.datamodules.views import Views, seeded
from lightspan.errors import UserError


class _Failure(str):
    """A user's error on its way out of a worker: DataLoader would wrap the exception in a traceback."""


@dataclass(frozen=True)
class Decoding:
    """Makes a sample of the members of a shard. The fields are those of `Shards`; mean and std are [3, 1, 1]."""

    fields: dict[str, str]
    image_size: int | None
    views: Views | None
    mean: Tensor
    std: Tensor
    seed: int

    def __call__(self, members: dict[str, Any], turn: tuple[int, int]) -> dict[str, Any]:
        sample = decode_fields(members, self.fields)
        # A shard's samples have no running number; a hash of where they lie is as good, and the same on every rank.
        name = f"{members['__url__']}\0{members['__key__']}".encode("utf-8", "surrogateescape")
        index = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
        if "image" in sample:
            image = self._standardised(self._resized(sample.pop("image")).float() / 255)
            if self.views is None:
                sample["image"] = image
            else:
                with seeded(_number([self.seed, *turn, index])):
                    sample["views"] = [self._standardised(view) for view in self.views(image)]
        return {**sample, "index": torch.tensor(index)}

    def _resized(self, image: Tensor) -> Tensor:
        if self.image_size is None:
            return image
        size, shorter = self.image_size, min(image.shape[1:])
        scaled = [round(side * size / shorter) for side in image.shape[1:]]
        return F.center_crop_image(F.resize_image(image, scaled, antialias=True), [size, size])

    def _standardised(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


def _number(entropy: list[int]) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


class ShardStream(IterableDataset[Any]):
    """Samples of the given shards, which workers take in turn; a `_Failure` in place of a user's error.

    Args:
        shards: of this rank.
        decode: makes the samples.
        max_member_bytes: the largest member that is read.
        shuffle_buffer: None passes once over the shards in order. A number passes over them without end, in an order
            drawn for each pass, and mixes that many samples.
    """

    def __init__(
        self, shards: Sequence[str], decode: Decoding, max_member_bytes: int, shuffle_buffer: int | None
    ) -> None:
        self.shards, self.decode = shards, decode
        self.max_member_bytes, self.shuffle_buffer = max_member_bytes, shuffle_buffer
        self.epoch = 0  # iterations begun: each starts with an order of its own

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        shards = self.shards[number::workers]
        try:
            if self.shuffle_buffer is None:
                yield from (self.decode(members, (0, 0)) for members in self._read(shards))
            else:
                yield from self._endless(shards, self.shuffle_buffer, number)
        except UserError as error:
            yield _Failure(error)

    def _endless(self, shards: Sequence[str], shuffle_buffer: int, worker: int) -> Iterator[Any]:
        sweep = 0
        while True:
            turn = (self.epoch, sweep)
            generator = np.random.Generator(np.random.PCG64([self.decode.seed, *turn, worker]))
            ordered = [shards[i] for i in generator.permutation(len(shards))]
            count = 0
            for members in shuffle(self._read(ordered), shuffle_buffer, generator):
                yield self.decode(members, turn)
                count += 1
            if not count:
                raise UserError(f"shards {', '.join(shards)} hold no sample; correct data.init_args.shards")
            sweep += 1

    def _read(self, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
        for shard in shards:  # one by one: members of two shards never form one sample
            yield from read_samples(shard, self.max_member_bytes)


def shuffle(samples: Iterator[Any], size: int, generator: np.random.Generator) -> Iterator[Any]:
    """The same samples, each held back at random among about `size` others; their order stays where size is below 2."""
    held: list[Any] = []
    for sample in samples:
        if len(held) < max(size, 1):
            held.append(sample)
            continue
        place = int(generator.integers(len(held)))
        yield held[place]
        held[place] = sample
    yield from (held[i] for i in generator.permutation(len(held)))


class ShardLoader:
    """Batches of a `ShardStream`. It has no length: how many samples there are is unknown until the shards are read.

    Its state is the number of epochs begun: a resumed run draws new orders and does not repeat the first.
    """

    def __init__(self, stream: ShardStream, batch_size: int, num_workers: int, pin_memory: bool) -> None:
        self.stream, self.batch_size, self.pin_memory = stream, batch_size, pin_memory
        self.num_workers = min(num_workers, len(stream.shards))

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.stream,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )
        self.stream.epoch += 1  # before the workers take their copy
        for batch in loader:
            if isinstance(batch, _Failure):
                raise UserError(str(batch))
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.stream.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.stream.epoch = state_dict["epoch"]


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, KeyError) as error:
        return _Failure(
            f"samples do not fit into one batch: {error}; set data.init_args.image_size for images of several sizes, "
            "and leave fields of several shapes out of data.init_args.fields"
        )


class Shards(LightningDataModule):
    """Batches from WebDataset tar shards: members `KEY.ENDING` that lie side by side form one sample.

    A batch maps each name of `fields` to its values, and `index` to int64 [B], a hash of shard and key. The field
    `image` becomes float32 [B, 3, H, W], standardised, as in `ImageBatch`; in training with `views` it becomes `views`,
    as in `ViewsBatch`. `cls` members become int64 [B], `npy` members tensors [B, ...], `txt` members lists of str.

    Shard i goes to rank i % ranks, and a rank's shards to its workers in turn. Training passes over its shards without
    end, so that ranks whose shards differ in size stay in step: bound the run by trainer.max_steps, and epochs by
    trainer.limit_train_batches. That ranks see every sample equally often where shards are uneven, and that a resumed
    run goes on at its sample, is not given here; the other datamodules give both.

    Args:
        shards: local paths and https addresses; `{000..099}` and `{a,b}` are written out. `pipe:` and every other
            scheme is refused.
        val_shards: likewise, read once each validation; no validation where None.
        fields: name in the batch -> ending of the member, or several as "jpg|png", of which the first present one wins.
            Decoders exist for jpg, jpeg, png, webp, cls, txt, json and npy (without pickle).
        batch_size: samples of one optimiser step over all ranks.
        image_size: H = W in pixels; the shorter side is scaled to it and the middle cut out. None leaves images as is.
        views: makes the views of a training image.
        mean, std: of the image's channels in [0, 1], for standardising.
        shuffle_buffer: training samples held back to mix them, for each worker.
        seed: of the order and of the views.
        num_workers: processes that read; a rank uses at most one for each of its shards.
        max_member_mib: the largest member that is read, in MiB.

    Raises: UserError before the first step for a pattern, scheme or field that cannot work; while reading for a shard
        that is missing, no tar, cut short, or unsafe, naming it.
    """

    def __init__(
        self,
        shards: list[str],
        val_shards: list[str] | None = None,
        fields: dict[str, str] | None = None,
        batch_size: int = 256,
        image_size: int | None = None,
        views: Views | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        shuffle_buffer: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
        max_member_mib: int = 256,
    ) -> None:
        super().__init__()
        fields = {"image": "jpg|jpeg|png|webp", "label": "cls"} if fields is None else fields
        check_fields(fields)
        self.shards, self.val_shards = _written_out("shards", shards), _written_out("val_shards", val_shards or [])
        if not self.shards:
            raise UserError("shards is an empty list; name at least one tar file")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size={image_size} pixels is too small; it must be at least 1")
        if min(std) <= 0:
            raise UserError(f"std={list(std)} must be above 0 in every channel")
        mean_C11, std_C11 = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        self.decode = Decoding(fields, image_size, views, mean_C11, std_C11, seed)
        self.batch_size, self.shuffle_buffer, self.num_workers = batch_size, shuffle_buffer, num_workers
        self.max_member_bytes = max_member_mib * 2**20

    def train_dataloader(self) -> ShardLoader:
        trainer = self.trainer
        if trainer and trainer.max_steps == -1 and isinstance(trainer.limit_train_batches, float):
            raise UserError(
                "training shards are read without end, so no epoch of this run would end; set trainer.max_steps, or "
                "trainer.limit_train_batches to a whole number"
            )
        return self._loader(self.shards, self.decode, self.shuffle_buffer)

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        return self._loader(self.val_shards, replace(self.decode, views=None), None) if self.val_shards else []

    def _loader(self, shards: list[str], decode: Decoding, shuffle_buffer: int | None) -> ShardLoader:
        rank, world_size = data_rank(self.trainer)
        if len(shards) < world_size:
            raise UserError(
                f"{len(shards)} shards are too few for {world_size} ranks, of which each reads its own; split them "
                f"into at least {world_size}, or use fewer devices"
            )
        stream = ShardStream(shards[rank::world_size], decode, self.max_member_bytes, shuffle_buffer)
        micro = micro_batch_size(self.batch_size, self.trainer)
        return ShardLoader(stream, micro, self.num_workers, pins_memory(self.trainer))


def _written_out(setting: str, patterns: list[str]) -> list[str]:
    shards = [shard for pattern in patterns for shard in expand_braces(pattern)]
    for shard, count in Counter(shards).items():
        check_shard(shard)
        if count > 1:
            raise UserError(f"{setting} names {shard} {count} times; name each shard once")
    return shards
