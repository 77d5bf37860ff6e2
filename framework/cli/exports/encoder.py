"""A method's encoder as files that need no lightspan: a torch.export program, and a timm folder where timm knows it.

Shapes: B pictures, C H W, D features.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.cli.exports.folder import whole_folder
from lightspan.cli.exports.products import Product, program, tensors, timm_folder
from lightspan.cli.exports.standalone import Standalone, reading_of
from lightspan.cli.exports.timm_folder import timm_network
from lightspan.core.cards import CARD
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import remove
from lightspan.core.files.runs import EXPORT, MODEL

PROGRAM, TIMM = "encoder.pt2", "timm"


class WrittenEncoder(NamedTuple):
    """What was written into the folder.

    Attributes:
        files: their names, and those of folders.
        difference: the largest one of features read back.
        remarks: what could not be written.
        inputs: form of the inputs, as `Reading.describe` gives it.
        loading: Python that loads the first of the files; FOLDER stands for the folder.
    """

    files: list[str]
    difference: float
    remarks: list[str]
    inputs: dict[str, Any]
    loading: str


def write_encoder(
    method: nn.Module,
    mean_C11: Tensor,
    std_C11: Tensor,
    size: int,
    out: Path,
    card: Callable[[WrittenEncoder], str] | None = None,
) -> WrittenEncoder:
    """Writes a folder, or replaces that of an earlier export, with

    - encoder.pt2: `torch.export.load(PATH).module()(images)`, images float32 [B, C, size, size] in [0, 1], any B. What
      `features` does not use, such as a projector, is left out.
    - timm/: `timm.create_model("local-dir:FOLDER/timm", pretrained=True)`, of standardised images; or, for a backbone
      that timm did not build, model.safetensors: its weights.
    - export.json: form of input and features, mean and deviation.

    Args:
        method: has `features(batch)`; its modes of training, device and precision are restored.
        mean_C11, std_C11: of the pictures that it was trained on.
        card: gives the README.md of the folder, if it is to have one.
    """
    with torch.no_grad(), _as_written(method), whole_folder(out) as folder:
        image_1CHW = torch.zeros(1, len(mean_C11), size, size)
        reading = reading_of(method, {"image": image_1CHW}, (mean_C11, std_C11))
        written = _write(Standalone(method, reading), folder)
        if card is not None:
            (folder / CARD).write_text(card(written), encoding="utf-8")
        return written


def _write(encoder: Standalone, folder: Path) -> WrittenEncoder:
    backbone, about = getattr(encoder.method, "backbone", None), encoder.reading.describe()
    (image_BCHW,) = encoder.reading.rows(2)
    features_BD = encoder(image_BCHW)
    products: dict[str, Product] = {}
    remarks = []
    try:
        products[PROGRAM] = program(encoder, folder, PROGRAM, {})
    except UserError as error:
        remarks.append(str(error))
        (folder / PROGRAM).unlink(missing_ok=True)
    if isinstance(backbone, nn.Module):
        if (apart := _for_timm(backbone, encoder, folder / TIMM)) is not None:
            products[TIMM] = replace(apart, loading=apart.loading.replace("FOLDER", f"FOLDER/{TIMM}"))
        else:
            products[MODEL] = tensors(backbone, folder, {})
    difference = max((product.difference for product in products.values()), default=0.0)
    record = {
        "format": "encoder",
        "input": f"float32 [B, {', '.join(map(str, image_BCHW.shape[1:]))}] in [0, 1]",
        "features": features_BD.shape[1],
        "mean": about["mean"],
        "std": about["std"],
        "largest_difference": difference,
    }
    (folder / EXPORT).write_text(json.dumps(record, indent=1) + "\n")
    loading = next((product.loading for product in products.values()), "")
    return WrittenEncoder(list(products), difference, remarks, about, loading)


def _for_timm(backbone: nn.Module, encoder: Standalone, folder: Path) -> Product | None:
    """None, and no folder, if timm cannot build the backbone, or the features are not its output."""
    network = timm_network(backbone)
    if network is None:
        return None
    try:
        product = timm_folder(network, encoder, folder)
    except UserError:
        return None
    if product.difference <= product.limit:
        return product
    remove(folder)
    return None


@contextlib.contextmanager
def _as_written(method: nn.Module) -> Iterator[None]:
    """Inside, the method is on the CPU, in float32 and in evaluation mode."""
    modes = [(part, part.training) for part in method.modules()]
    forms = {name: (tensor.device, tensor.dtype) for name, tensor in _tensors(method)}
    try:
        method.cpu().float().eval()
        yield
    finally:
        for name, tensor in _tensors(method):
            tensor.data = tensor.data.to(*forms[name])
        for part, training in modes:
            part.training = training


def _tensors(method: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(method.named_parameters(), method.named_buffers())
