"""Streams samples from WebDataset tar shards: local, over https, or in an object store."""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningDataModule
from rich.progress import track
from torch import Tensor
from torch.utils.data import default_collate

from lightspan.core.batches import batch_type_of
from lightspan.core.distributed import rank, world_size
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import BYTES
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.core.files.stores import SCHEME
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields, Place
from lightspan.datamodules.image.augment.views import Views, numbers_of_views
from lightspan.datamodules.image.packed import fitted
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.ranks import evaluation_loader, say, train_loader
from lightspan.datamodules.shards.cache import ShardCache
from lightspan.datamodules.shards.decoders import IMAGES, check_fields, decode_fields
from lightspan.datamodules.shards.fetch import check_shard, expand_braces, local_path
from lightspan.datamodules.shards.samples import OpenShard, ShardOpener, ShardSamples
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png

GIB = 2**30
OPENED_BETWEEN_MEETINGS = 4  # how many shards a rank opens before all ranks exchange what they found
MAX_REMARKS = 10  # how many are printed for the shards of one setting
T = TypeVar("T")


@dataclass(frozen=True)
class Decoding:
    """Makes the values of a sample from its members.

    Args:
        fields, image_size: those of `Shards`.
        image: makes the fields of the image.
    """

    fields: dict[str, str]
    image_size: int | None
    image: ImageFields

    @property
    def batch_type(self) -> type | None:
        """None where the user's own fields make the batch."""
        usual = self.fields.keys() == {"image", "label"} and self.fields["label"] == "cls"
        return self.image.batch_type if usual else None

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        sample = decode_fields(members, self.fields)
        if "image" in sample:
            sample |= self.image(self._resized(sample.pop("image")), seed)
        return sample

    def plain(self) -> Self:
        """The same without views or anything else that is random, made where batches are fetched."""
        return replace(self, image=replace(self.image, views=None, made_on="workers"))

    def _resized(self, image: Tensor) -> Tensor:
        if self.image_size is None:
            return image
        return fitted(image, self.image_size, "crop", background=0)


class Shards(LightningDataModule):
    """Batches from WebDataset tar shards: adjacent members `KEY.ENDING` form one sample.

    A batch maps each name of `fields` to its values, and `index` to int64 [B], the sample's number over all shards.
    The field `image` becomes float32 [B, 3, H, W], standardised, as in `ImageBatch`; in training with `views` it
    becomes `views`, as in `ViewsBatch`. `cls` members become int64 [B], `npy` members tensors [B, ...], `txt` members
    lists of str.

    Every sample is seen exactly once in each epoch on any number of ranks and workers, whatever the sizes of the
    shards, and a run that stops at any step continues with the next sample, even on other ranks: see `ExactLoader` and
    `Order`. For this, each shard needs an index, SHARD.index.json, as `lightspan data pack` writes it; a shard without
    one is read completely once when the run starts, and its index is kept in the run folder.

    Memory: 16 bytes per sample on each rank for the order, 20 for the index. Reading: only `window` shards are in use
    at a time, sample by sample in mixed order, so they should fit into the memory that the system has for its file
    cache. Remote shards are fetched completely, once per machine, or sample by sample with `cache_gib=0`.

    Args:
        shards: local paths, https addresses, and those of object stores, such as s3://BUCKET/NAME.tar (the extra
            `cloud`); `{000..099}` and `{a,b}` are expanded. `pipe:` and every other scheme is refused.
        val_shards: likewise, read once in each validation; None means no validation.
        hold_out: without `val_shards`, the last so many of `shards` validate and do not train; for probes, say.
        bank_size: training samples on which probes fit, spread evenly over all shards; None means all, each time.
        fields: name in the batch -> ending of the member, or several as "jpg|png", of which the first present one wins.
            Decoders exist for jpg, jpeg, png, webp, cls, txt, json, npy (without pickle), tif and tiff;
            `RecordingShards` read sound.
        batch_size: samples of one optimiser step over all ranks.
        image_size: H = W in pixels; the shorter side is scaled to it and the centre cropped. None leaves images as is.
        views: makes the views of a training image.
        mean, std: of the image's channels in [0, 1], for standardising.
        window: shards whose training samples are mixed with one another, >= 1.
        seed: of the order and of the views.
        num_workers: processes that fetch batches.
        max_member_mib: the largest member that is read, in MiB, at most the limit of bytes.
        skip_damaged: True trains without what cannot be read: missing shards and missing ends are left out before the
            order is drawn; any other damaged sample is replaced by one drawn from the seed, the same on any
            number of ranks.
        cache_dir: folder for copies of remote shards; None means ~/.cache/lightspan/shards. A recipe may name one
            below ~/.cache/lightspan or `${run}`, a flag any.
        cache_gib: GiB that all copies together may use; the least recently used are deleted for new ones. A single
            shard that is larger is refused. With 0 nothing is copied: each sample is one request for its own bytes,
            and a remote shard needs an index.
        views_on: "workers" makes views one image at a time where batches are fetched; "device" makes those of a whole
            batch where the model is, from the same numbers, and needs images of one size: set `image_size`.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`; a mixture may be one over the shards.

    Raises: UserError before the first step for a pattern, scheme or field that cannot work, and, unless `skip_damaged`,
        for a shard that is missing, not a tar, or cut short; while reading, for a sample that is damaged, naming shard,
        sample and byte.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        fields: dict[str, str] | None = None,
        batch_size: int = 256,
        image_size: int | None = None,
        views: Views | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        window: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        max_member_mib: int = 256,
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        cache_gib: float = 64,
        views_on: Place = "workers",
        hold_out: int = 0,
        bank_size: int | None = None,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__()
        fields = {"image": "jpg|jpeg|png|webp", "label": "cls"} if fields is None else fields
        check_fields(fields)
        self.shards, self.val_shards = written_out("shards", shards), written_out("val_shards", val_shards or [])
        if not self.shards:
            raise UserError("shards is an empty list; name at least one tar file")
        if hold_out and (val_shards or not 0 < hold_out < len(self.shards)):
            given = (
                "val_shards is given too" if val_shards else f"there are {len(self.shards)} shards, and one must train"
            )
            raise UserError(
                f"hold_out={hold_out} shards cannot validate: {given}; leave one of them out or lower hold_out"
            )
        if hold_out:
            self.shards, self.val_shards = self.shards[:-hold_out], self.shards[-hold_out:]
        if bank_size is not None and bank_size < 1:
            raise UserError(f"bank_size={bank_size} must be at least 1; leave it out to take all samples")
        self.bank_size, self.selection = bank_size, selection
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size={image_size} pixels is too small; it must be at least 1")
        require_numbers(numbers_of_views(views, image_size or 1), image_size=image_size)
        if window < 1:
            raise UserError(f"window={window} shards is too few; it must be at least 1")
        if cache_gib < 0 or max_member_mib < 1:
            raise UserError(f"cache_gib={cache_gib} must be at least 0, and max_member_mib={max_member_mib} at least 1")
        if max_member_mib * 2**20 > BYTES.most:
            raise UserError(
                f"max_member_mib={max_member_mib} is above the limit of {BYTES.most:,} bytes that are read at once; "
                f"lower it, or raise the limit with {BYTES.setting} in the environment"
            )
        if min(std) <= 0:
            raise UserError(f"std={list(std)} must be above 0 in every channel")
        mean_C11, std_C11 = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        self.decode = Decoding(fields, image_size, ImageFields(mean_C11, std_C11, views, views_on))
        self.decode.image.attach(self)
        self.batch_size, self.window, self.seed, self.num_workers = batch_size, window, seed, num_workers
        self.max_member_bytes, self.skip_damaged = max_member_mib * 2**20, skip_damaged
        self.cache = ShardCache(cache_dir, int(cache_gib * GIB))
        self.train: ShardSamples | None = None
        self.val: ShardSamples | None = None

    @property
    def batch_type(self) -> type | None:
        """Of training batches; None where `fields` are the user's own."""
        return batch_type_of(self.decode)

    def setup(self, stage: str | None = None) -> None:
        """Find the samples of all shards, once; each rank opens some, and all share what they found."""
        if self.train is not None:
            return
        self.train = self._samples("shards", self.shards, self.decode)
        plain = self.decode.plain()
        self.bank = self.train.decoded_by(plain)
        self.val = self._samples("val_shards", self.val_shards, plain)
        say(
            f"shards: {len(self.shards)} with {len(self.train):,} training samples, {len(self.val_shards)} with "
            f"{len(self.val):,} validation samples"
        )
        tell(self.train, self.val)

    def train_dataloader(self) -> ExactLoader:
        assert self.train is not None
        order = self.train.order(self.window)
        settings = self.batch_size, self.seed, self.num_workers, self.trainer
        return train_loader(self.train, *settings, order, self.selection)

    def bank_dataloader(self) -> EvaluationLoader:
        """`bank_size` training samples without views, in order: what probes fit on."""
        count = len(self.bank)
        chosen = None
        if self.bank_size is not None and self.bank_size < count:
            chosen = (np.arange(self.bank_size) * count // self.bank_size).tolist()
        return evaluation_loader(self.bank, self.batch_size, self.num_workers, self.trainer, chosen)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Black and white after standardising, each [3, 1, 1]."""
        image = self.decode.image
        return -image.mean / image.std, (1 - image.mean) / image.std

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        assert self.val is not None
        return evaluation_loader(self.val, self.batch_size, self.num_workers, self.trainer) if self.val_shards else []

    def is_absent(self) -> bool:
        """Whether no shard is here, nor elsewhere."""
        return not any("://" in shard or Path(shard).exists() for shard in self.shards)

    def stand_in(self) -> dict[str, Any] | None:
        """A training batch of two examples, for a plan where no shard is. None where one is at hand, here or
        elsewhere, and for fields whose shape only the shards know.
        """
        sample = self.example() if self.is_absent() else None
        return None if sample is None else default_collate([sample | {"index": torch.tensor(i)} for i in range(2)])

    def example(self) -> dict[str, Any] | None:
        """A training sample made of nothing: a black picture of ImageNet's usual size with class 0. None for fields
        whose shape only the shards know (npy).
        """
        known = {**dict.fromkeys(IMAGES, black_png(375, 500)), "cls": b"0", "txt": b"", "json": b"null"}
        endings = [ending for field in self.decode.fields.values() for ending in field.split("|")]
        if not known.keys() >= set(endings):
            return None
        return self.decode(NOWHERE | {ending: known[ending] for ending in endings}, seed=0)

    def _samples(self, setting: str, shards: list[str], decode: Decoding) -> ShardSamples:
        opened, problem = self._opened(setting, shards)
        damage = [shard.damage for shard in opened if shard.damage is not None]
        nothing = shards and not any(shard.usable for shard in opened)
        if problem is None and damage and (nothing or not self.skip_damaged):
            more = f" (and {len(damage) - 1} more damaged shards)" if damage[1:] else ""
            way_out = (
                f"no shard has a sample that can be read; correct data.init_args.{setting}"
                if nothing
                else "put the shard back or fetch it again, or train without these samples with "
                "data.init_args.skip_damaged=true"
            )
            problem = f"{damage[0]}{more}; {way_out}{_begin(shards)}"
        if problem is None and nothing:
            problem = f"{setting} {', '.join(shards[:5])} contain no sample; correct data.init_args.{setting}"
        if problem is not None:
            raise UserError(problem)
        return ShardSamples(opened, decode, self.cache, self.max_member_bytes, self.skip_damaged)

    def _opened(self, setting: str, shards: list[str]) -> tuple[list[OpenShard], str | None]:
        """Opens the shards, each on one rank; returns all of them in order on every rank, or the first that failed.

        All ranks must draw the same order, even if one of them misses a shard. They meet after every few shards, so
        that none waits longer for another than those take to be scanned.
        """
        here, ranks = (rank(), world_size()) if self.trainer is not None else (0, 1)
        scans = Path(self.trainer.default_root_dir) / "shards" if self.trainer else None
        opener = ShardOpener(self.cache, scans, self.max_member_bytes)
        opened: list[OpenShard] = []
        portion = OPENED_BETWEEN_MEETINGS * ranks
        silent = here > 0 or not sys.stdout.isatty()
        for at in track(range(0, len(shards), portion), f"opening {setting}", transient=True, disable=silent):
            parts = _gathered(_opened(opener, shards[at : at + portion][here::ranks]), ranks)
            for number in range(len(shards[at : at + portion])):
                found = parts[number % ranks][number // ranks]
                if isinstance(found, str):
                    return [], found
                opened.append(found)
        return opened, None


def tell(*sets: ShardSamples) -> None:
    """Prints what was left out of the sets, and what was remarkable."""
    for damage in (damage for samples in sets for damage in samples.damage):
        say(f"left out: {damage}")
    for samples in sets:
        for remark in samples.remarks[:MAX_REMARKS]:
            say(remark)
        if len(samples.remarks) > MAX_REMARKS:
            say(f"and {len(samples.remarks) - MAX_REMARKS} more remarks of this kind")


def _begin(shards: list[str]) -> str:
    """Where relative paths begin, if there are any."""
    relative = any(not SCHEME.match(shard) and not local_path(shard).is_absolute() for shard in shards)
    return f"; relative paths begin at {Path.cwd()}" if relative else ""


def _opened(opener: ShardOpener, shards: list[str]) -> list[OpenShard | str]:
    """The shards up to the first that cannot be opened, and then why."""
    found: list[OpenShard | str] = []
    for shard in shards:
        try:
            found.append(opener.open(shard))
        except UserError as error:
            return [*found, str(error)]
    return found


def _gathered(own: T, ranks: int) -> list[T]:
    """What each rank has, in the order of the ranks. Every rank must call it."""
    if ranks == 1:
        return [own]
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    return parts


def written_out(setting: str, patterns: list[str]) -> list[str]:
    """Shards by name, of patterns. Raises: UserError for one that is named twice, or cannot be read from there."""
    shards = [shard for pattern in patterns for shard in expand_braces(pattern)]
    for shard, count in Counter(shards).items():
        check_shard(shard)
        if count > 1:
            raise UserError(f"{setting} names {shard} {count} times; name each shard once")
    return shards
