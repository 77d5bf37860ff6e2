"""Features as an input of a recipe: those of an encoder on a data set, or those in a file.

Shapes: B samples of a batch, C H W image, T positions, D features.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from lightspan.core.batches import batch_type_of, single_fields
from lightspan.core.collate import taken
from lightspan.core.distributed import digest_of_first_rank, gather_rows, raise_on_all_ranks, rank
from lightspan.core.errors import UserError, first_lines
from lightspan.core.files.arrays import read_arrays
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import stored_tensors
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.identity import data_identity, module_identity
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.preprocessing import stated
from lightspan.evaluation.features.store import FeatureStore, Rows
from lightspan.nn.tokens import Tokens, arranged, chosen_layers, token_features

Pool = Literal["none", "mean", "first"]
Split = Literal["bank", "val", "test"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoded(Input):
    """What an encoder makes of each sample of a split, from the feature store, or computed if it is not there.

    The encoder is a method, any module with `features(batch)`, which is called with the batch and reads its own layers
    if it has `token_features`; or else a network, which is called with the fields of it that the data declare as read.
    It is used in evaluation mode and without gradients. Entries of the store are told apart by the encoder's code,
    attributes, hooks and weights (`lightspan.evaluation.features.description` says what of them is not followed), the
    layer, the transforms, and some of the samples as the encoder gets them.

    Args:
        encoder: the network or method.
        data: its `bank_dataloader` and the like yield mappings with `index` and perhaps `label`.
        split: "bank" (training samples without augmentation), "val" or "test".
        field: of the batch, for an encoder without `features`; None takes those that the data declare as read, or
            `image` where they declare none.
        transforms: applied in order to that field, which must be a single one, as one batch: a resize, a normalisation.
        layer: counted as `lightspan.nn.tokens` counts layers, whose output is taken instead; -1 is the last.
        pool: what becomes of tokens, as `lightspan.nn.tokens.Tokens` arranges them: their "mean", the "first", or
            "none" keeps them.
        dtype: of the features on disk.
        fields: of the batches, that the features carry beside their labels, such as `tracklet` or `camera`. They are
            read off the data each time and are not in the store.
    """

    def __init__(
        self,
        encoder: nn.Module,
        data: LightningDataModule,
        split: Split = "bank",
        field: str | None = None,
        transforms: list[nn.Module] | None = None,
        layer: int | None = None,
        pool: Pool = "mean",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        fields: list[str] | None = None,
    ) -> None:
        self.fields = list(fields or ())
        if layer is not None and not hasattr(encoder, "token_features"):
            chosen_layers(encoder, [layer])
        self.encoder, self.data, self.split, self.field = encoder, data, split, field
        self.transforms, self.layer, self.pool, self.dtype = list(transforms or ()), layer, pool, dtype
        if self.transforms and self._is_method():
            raise UserError(
                f"transforms go before a network, but {type(encoder).__name__} takes the whole batch itself; leave "
                "transforms out, or name its network as the encoder"
            )

    def load(self, store: FeatureStore) -> Features:
        """Raises: UserError for data without that split or without an index, or features of another form."""
        loader = self._loader()
        features = store.get(self.key(loader), lambda done: self._rows(loader, done, store.device))
        return replace(features, fields=self._columns(loader, features)) if self.fields else features

    def outlook(self, store: FeatureStore) -> str:
        loader = self._loader()
        key = self.key(loader)
        what = "in the store" if store.holds(key) else "to be computed"
        return f"features of {key['data']['count']} samples, {what} at {store.entry(key)}"

    def key(self, loader: Any) -> dict[str, Any]:
        """What these features depend on, the same on every rank: the first one reads the samples for all.

        Raises: UserError if ranks have different encoders, or ones that `Description` cannot describe.
        """
        with raise_on_all_ranks("describe the encoder"):
            encoder, *transforms = (module_identity(module) for module in (self.encoder, *self.transforms))
        digest = hashlib.sha256(json.dumps([encoder, *transforms]).encode()).hexdigest()
        first = digest_of_first_rank(digest)
        with raise_on_all_ranks("describe the same encoder"):
            if digest != first:
                raise UserError(
                    f"{type(self.encoder).__name__} of rank {rank()} differs from that of rank 0 in its "
                    "weights, attributes or transforms; seed it equally everywhere and keep ranks and devices out of it"
                )
        data = data_identity(self.data, loader)
        data["sha256"] = digest_of_first_rank(data["sha256"])
        said = stated(self.transforms)
        return {
            **({} if said is None else {"preprocessing": said}),
            "encoder": encoder,
            "transforms": transforms,
            "reads": None if self._is_method() else ", ".join(self._reads(loader)),
            "layer": self.layer,
            "tokens": self.pool,
            "dtype": self.dtype,
            "data": data,
            "split": self.split,
        }

    def _columns(self, loader: Any, features: Features) -> dict[str, Tensor]:
        """The fields of all ranks' samples, in the order of the features."""
        names, parts = ("index", *self.fields), list[list[Tensor]]()
        with raise_on_all_ranks("read the fields"):
            for batch in loader:
                if lacking := [name for name in names if name not in batch]:
                    raise UserError(f"a batch has no {lacking[0]!r}; it contains {sorted(batch)}; set fields")
                parts.append([batch[name] for name in names])
        index_N, *columns = (gather_rows(torch.cat(column))[0] for column in zip(*parts, strict=True))
        assert features.index_N is not None
        order_N = index_N.argsort(stable=True)
        place_N = order_N[torch.searchsorted(index_N[order_N], features.index_N)]  # a sample may come twice
        return {name: column[place_N] for name, column in zip(self.fields, columns, strict=True)}

    def _batch_type(self, loader: Any) -> type | None:
        return batch_type_of(getattr(loader, "dataset", None), self.data)

    def _reads(self, loader: Any) -> list[str]:
        names = single_fields(self._batch_type(loader)) if self.field is None else [self.field]
        if self.transforms and len(names) > 1:
            raise UserError(
                f"transforms change one field, and {type(self.encoder).__name__} is called with {', '.join(names)}; "
                "leave transforms out, or set field"
            )
        return names

    def _loader(self) -> Any:
        return split_loader(self.data, self.split)

    def _rows(self, loader: Any, done: set[int], device: torch.device) -> Iterator[Rows]:
        kind, names = self._batch_type(loader), self._reads(loader)
        modes = [(part, part.training) for part in self.encoder.modules()]
        self.encoder.to(device).eval()
        for transform in self.transforms:
            transform.to(device)
        try:
            for batch in loader:
                if "index" not in batch:
                    raise UserError(f"a batch for the feature store has no index: it contains {sorted(batch)}")
                left = [i for i, index in enumerate(batch["index"].tolist()) if index not in done]
                if not left:
                    continue
                if len(left) < len(batch["index"]):
                    batch = taken(batch, left, kind)
                with torch.no_grad():
                    x = self._encode(_moved(batch, device), names).to(DTYPES[self.dtype])
                if len(x) != len(left):
                    raise UserError(f"{type(self.encoder).__name__} made {list(x.shape)} of {len(left)} samples")
                rows = {"features": x, "index": batch["index"]}
                yield rows | ({"label": batch["label"]} if "label" in batch else {})
        finally:
            for part, training in modes:
                part.training = training

    def _encode(self, batch: Any, names: list[str]) -> Tensor:
        if self.layer is None:
            return pooled(self.encoder, self._run(batch, names), self.pool)
        if (of_method := getattr(self.encoder, "token_features", None)) is not None:
            with _reading(self.encoder, _fields(batch, names)):
                (tokens,) = of_method(batch, [self.layer])
        else:
            (tokens,) = token_features(self.encoder, lambda: self._run(batch, names), [self.layer])
        return _by(tokens, self.pool)

    def _run(self, batch: Any, names: list[str]) -> Any:
        if self._is_method():
            with _reading(self.encoder, _fields(batch, names)):
                return self.encoder.features(batch)  # type: ignore[operator]
        if lacking := [name for name in names if name not in batch]:
            raise UserError(f"a batch has no {lacking[0]!r}; it contains {sorted(batch)}; set field")
        x, *rest = (batch[name] for name in names)
        for transform in self.transforms:
            x = transform(x)
        with _reading(self.encoder, [x, *rest]):
            return self.encoder(x, *rest)

    def _is_method(self) -> bool:
        features = getattr(self.encoder, "features", None)
        return callable(features) and not isinstance(features, nn.Module)  # some networks have a part of this name


def split_loader(data: LightningDataModule, split: Split) -> Any:
    """That of a data module which is set up for it here. Raises: UserError for data without that split."""
    make = getattr(data, name := f"{split}_dataloader", None)
    if make is None or getattr(type(data), name, None) is getattr(LightningDataModule, name, make):
        raise UserError(f"{type(data).__name__} has no {name}(); choose another split")
    data.prepare_data()
    data.setup("test" if split == "test" else "fit")
    return make()


class FeatureFile(Input):
    """Features that another program made: a safetensors or .npz file with `features` and perhaps `label` and `index`.
    What else it holds are fields of the samples, such as `tracklet` or `camera`. The metadata of safetensors may state,
    as JSON under `preprocessing`, how images were prepared, see
    `lightspan.evaluation.features.preprocessing.Preprocess.statement`.

    Args:
        path: of the file.
    """

    def __init__(self, path: ReadPath) -> None:
        self.path = path

    def load(self, store: FeatureStore) -> Features:
        """Raises: UserError for a file that is missing or not of this kind."""
        file = expanded(self.path, "path")
        if not file.is_file():
            raise UserError(
                f"there are no features at {file}; write them as safetensors or .npz, with `features` [N, D]"
            )
        columns, metadata = (_arrays(file), dict[str, str]()) if file.suffix == ".npz" else stored_tensors(file)
        said = metadata.get("preprocessing")
        if "features" not in columns or columns["features"].ndim < 2 or not columns["features"].is_floating_point():
            raise UserError(f"{file} contains {', '.join(columns) or 'nothing'}; it needs `features`, floats [N, D]")
        x_ND, label_N, index_N = columns.pop("features"), columns.pop("label", None), columns.pop("index", None)
        key = str(file)
        if said is not None:
            try:
                key = json.dumps({"file": key, "preprocessing": json.loads(said)})
            except ValueError as error:
                raise UserError(f"{file} states its preprocessing as {said!r}, which is not JSON") from error
        return Features(x_ND, label_N, index_N, key, fields=columns)

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {len(self.load(store))} samples in {self.path}"


def _arrays(file: Path) -> dict[str, Tensor]:
    try:
        return {name: torch.from_numpy(array) for name, array in read_arrays(file).items()}
    except (ValueError, TypeError) as error:  # torch has no text, and no numbers of 80 bits
        raise UserError(f"{file} cannot be read as NumPy's .npz: {error}; write it again with np.savez") from error


def pooled(encoder: nn.Module, x: Any, pool: Pool) -> Tensor:
    """What an encoder gives as features, [B D] as it is.

    Raises: UserError for anything but floats [B D], [B T D] or maps [B D H W] of two or more axes.
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"{type(encoder).__name__} gave {got} as features, not floats [B, D]; set layer")
    return x if x.ndim == 2 else _by(arranged(encoder, x), pool)


def vectors(encoder: nn.Module, transforms: Sequence[nn.Module], x_BCHW: Tensor, pool: Pool) -> Tensor:
    """A vector for each image, float [B D], with gradients if they are on.

    Args:
        encoder: a method, called with a batch of `image`, or a network.
        transforms: before it, in order.
    Raises: UserError for what are no vectors.
    """
    x = x_BCHW
    for transform in transforms:
        x = transform(x)
    of_method = getattr(encoder, "features", None)
    with _reading(encoder, [x]):
        if callable(of_method) and not isinstance(of_method, nn.Module):
            x = of_method({"image": x})
        else:
            x = pooled(encoder, encoder(x), pool)
    if x.ndim != 2:
        raise UserError(f"this needs a vector for each image, and got {list(x.shape)}; set pool")
    return x.float()


def _fields(batch: Any, names: Sequence[str]) -> list[Any]:
    return [batch[name] for name in names if name in batch]


@contextmanager
def _reading(encoder: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """Raises: UserError where an encoder cannot compute on such inputs, as on one channel in place of three."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        shapes = ", ".join(str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
        kinds = {str(p.dtype).removeprefix("torch.") for p in encoder.parameters() if p.is_floating_point()}
        way_out = (
            "give it the size and channels that it was made for, by other data (--image-size) or by transforms before "
            "it, such as torchvision.transforms.v2.Grayscale with num_output_channels=3 and Resize"
            if kinds <= {"float32"}
            else f"its weights are {', '.join(sorted(kinds))}, and inputs float32; give it in float32"
        )
        raise UserError(
            f"{type(encoder).__name__} cannot read inputs {shapes}: {first_lines(error)}; {way_out}"
        ) from error


def _by(tokens: Tokens, pool: Pool) -> Tensor:
    return {"mean": tokens.pooled, "first": tokens.first, "none": lambda: tokens.tokens_BTD}[pool]()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(child, device) for key, child in value.items()}
    return [_moved(child, device) for child in value] if isinstance(value, list | tuple) else value
