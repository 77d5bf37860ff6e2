"""A method as a function of plain tensors: what programs without lightspan can run.

Shapes: B samples, C H W picture, D features.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.batches import SINGLE, is_packed, read_names, single_field, views_field
from lightspan.core.errors import UserError

What = Literal["features", "predict"]
BATCHES = (1, 2, 3, 5)
"""The sizes of the batches on which a written file is compared with the method."""
SAME = 1e-5
"""The largest difference between torch and torch, as `compare` counts it: what another attention kernel changes."""


class Compared(NamedTuple):
    """The largest difference of outputs over all batches, and the largest that is accepted."""

    difference: float
    limit: float


@dataclass(frozen=True)
class Reading:
    """What a method reads of a batch.

    Attributes:
        examples: each field that it reads, with a few samples, first dimension B.
        moments: mean and deviation of the channels of `standardise`, each [C 1 ...] with its axes, if that is in [0, 1]
            here and is to be standardised; None if fields are taken as they are.
        standardise: the field of pictures.
    """

    examples: dict[str, Tensor]
    moments: tuple[Tensor, Tensor] | None = None
    standardise: str = SINGLE

    def rows(self, count: int) -> tuple[Tensor, ...]:
        """A batch of `count` samples, each field's examples in turn."""
        return tuple(x[torch.arange(count) % len(x)] for x in self.examples.values())

    def standardised(self, image_BCHW: Tensor) -> Tensor:
        """Pictures as the method's backbone takes them."""
        if self.moments is None:
            return image_BCHW
        mean_C, std_C = self.moments
        return (image_BCHW - mean_C) / std_C

    def describe(self, inside: bool = True) -> dict[str, Any]:
        """The inputs and their standardising as plain values, for the files that are written.

        Args:
            inside: whether what is written standardises pictures itself, as `Standalone` does.
        """
        inputs: dict[str, dict[str, Any]] = {
            name: {"dtype": str(x.dtype).removeprefix("torch."), "shape": ["batch", *x.shape[1:]]}
            for name, x in self.examples.items()
        }
        if self.moments is None:
            return {"inputs": inputs, "standardise": "as the data of the run did, before it goes in"}
        if inside:
            inputs[self.standardise]["range"] = [0, 1]
        mean, std = (x.flatten().tolist() for x in self.moments)
        where = "inside" if inside else "before they go in"
        return {"inputs": inputs, "standardise": where, "mean": mean, "std": std}


class Standalone(nn.Module):
    """The fields of a batch, in the order of `reading`, each a tensor -> features float32 [B D], or predictions.

    Args:
        method: on the CPU, in float32 and in evaluation mode; has `features(batch)`, or `predict_step(batch, 0)`.
        what: which of the two.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, method: nn.Module, reading: Reading, what: What = "features") -> None:
        super().__init__()
        self.method, self.reading, self.what = method, reading, what
        if reading.moments is not None:
            for name, tensor in zip(("mean", "std"), reading.moments, strict=True):
                self.register_buffer(name, tensor.clone())
        self.training = False

    def forward(self, *fields: Tensor) -> Tensor:
        batch = dict(zip(self.reading.examples, fields, strict=True))
        if self.reading.moments is not None:
            name = self.reading.standardise
            batch[name] = (batch[name] - self.mean) / self.std
        return answer(self.method, batch, self.what)


def compare(network: Standalone, other: Callable[..., Tensor], tolerance: float = SAME) -> Compared:
    """Compares the outputs of both on batches of all sizes in `BATCHES`.

    Args:
        other: called as the network is.
        tolerance: accepted as a share of the network's largest finite output, or of 1 if that is smaller.
    """
    largest, scale = 0.0, 1.0
    with torch.no_grad():
        for count in BATCHES:
            rows = network.reading.rows(count)
            ours, theirs = network(*rows), other(*rows)
            largest = max(largest, largest_difference(ours, theirs))
            scale = max(scale, float(ours.abs().nan_to_num(0.0, posinf=0.0).amax()))
    return Compared(largest, tolerance * scale)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Of two tensors of outputs; infinite for other shapes, and where one of them is not a number."""
    if ours.shape != theirs.shape:
        return float("inf")
    apart = (ours.double() - theirs.double()).abs().nan_to_num(float("inf"))
    return float(apart.amax()) if apart.numel() else 0.0


def answer(method: Any, batch: Mapping[str, Tensor], what: What) -> Any:
    """Features or predictions of a batch."""
    return method.features(batch) if what == "features" else method.predict_step(batch, 0)


class _Noting(dict[str, Any]):
    """A batch that notes which of its fields are read."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        super().__init__(batch)
        self.read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        self.read[name] = super().__getitem__(name)
        return self.read[name]

    def get(self, name: str, default: Any = None) -> Any:
        self.read[name] = super().get(name, default)
        return self.read[name]


def reading_of(
    method: nn.Module,
    batch: Any,
    moments: tuple[Tensor, Tensor] | None,
    what: What = "features",
    calling: AbstractContextManager[None] | None = None,
    batch_type: type | None = None,
) -> Reading:
    """Runs the method on a batch once and finds which fields it reads.

    Pictures and other fields of floats become noise, uniform in [0, 1] where `moments` are known and normal elsewhere,
    so that a file is compared over all of what it may be given; whole numbers stay those of the batch.

    Args:
        method: on the CPU, in float32 and in evaluation mode.
        batch: as the data give it. Of views, the first one is the picture.
        moments: mean and deviation of its pictures, each [C 1 1], if they are known.
        calling: surrounds the call of the method, and may explain its errors.
        batch_type: of the batch, as the data declare it.
    Raises: UserError for a method that does not give one tensor with a row for each sample, or reads no tensor, or one
        with any number of rows a sample.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"an export reads the fields of a batch by name, but the data of this run give a {type(batch).__name__}; "
            "let them give a dictionary of tensors, or use --to safetensors"
        )
    fields = dict(batch)
    first = next(iter(read_names(fields, batch_type)), None)
    if first is not None and first == views_field(batch_type):
        first = single_field(batch_type)
        fields[first] = fields.pop(views_field(batch_type))[0]
    noting = _Noting(fields)
    found = _tried(method, noting, what, calling or nullcontext())
    read = {name: value for name, value in noting.read.items() if isinstance(value, Tensor) and value.dim()}
    if not read or not isinstance(found, Tensor) or len(found) != len(next(iter(read.values()))):
        raise UserError(
            f"{_call(method, what)} of a batch with {', '.join(sorted(fields))} gives {_form(found)}, and an export "
            "needs one tensor with a row for each sample; use --to safetensors"
        )
    if packed := [name for name in read if is_packed(name, fields, batch_type)]:
        raise UserError(
            f"{_call(method, what)} reads {', '.join(packed)}, of any number of rows a sample, and an export needs one "
            "row for each sample; use --to safetensors"
        )
    picture = read.get(first or SINGLE)
    if moments is not None and picture is not None and picture.is_floating_point():
        mean_C11, std_C11 = moments
        ones = [1] * (picture.dim() - 2)  # also of clips, whose channels stand before time
        moments = mean_C11.reshape(-1, *ones), std_C11.reshape(-1, *ones)
    else:
        moments = None
    generator = torch.Generator().manual_seed(0)
    examples = {}
    for name, x in read.items():
        draw = torch.rand if moments is not None and name == first else torch.randn
        examples[name] = draw(max(BATCHES), *x.shape[1:], generator=generator) if x.is_floating_point() else x
    return Reading(examples, moments, first or SINGLE)


def _tried(method: nn.Module, batch: _Noting, what: What, calling: AbstractContextManager[None]) -> Any:
    if what == "features" and not callable(getattr(method, "features", None)):
        raise UserError(f"{type(method).__name__} has no features(batch); add it, or export --what predict")
    try:
        with torch.no_grad(), calling:
            return answer(method, batch, what)
    except NotImplementedError as error:  # torch's forward, which Lightning's predict_step calls
        raise UserError(
            f"{type(method).__name__} has neither predict_step nor forward, so there is nothing to predict; export "
            "--what features"
        ) from error


def _call(method: nn.Module, what: What) -> str:
    return f"{type(method).__name__}.{'features' if what == 'features' else 'predict_step'}"


def _form(found: object) -> str:
    return f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
