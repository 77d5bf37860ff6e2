"""A method's encoder as files that need no lightspan: a torch.export program, and a timm folder where timm knows it.

Shapes: B pictures, C H W, D features.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.cards import CARD
from lightspan.errors import UserError
from lightspan.exports.folder import whole_folder
from lightspan.exports.program import write_program
from lightspan.exports.safetensors import write_safetensors
from lightspan.exports.standalone import Standalone, compare, reading_of
from lightspan.exports.timm_folder import read_timm, timm_network, write_timm
from lightspan.files import remove
from lightspan.run_files import EXPORT, MODEL

PROGRAM, TIMM = "encoder.pt2", "timm"


class Written(NamedTuple):
    """What was written into the folder.

    Attributes:
        files: their names, and those of folders.
        difference: the largest one of features read back.
        remarks: what could not be written.
        inputs: form of the inputs, as `Reading.describe` gives it.
    """

    files: list[str]
    difference: float
    remarks: list[str]
    inputs: dict[str, Any]

    def loading(self) -> str:
        """Python that loads the first of the files; FOLDER stands for the folder."""
        if PROGRAM in self.files:
            program = f'encoder = torch.export.load("FOLDER/{PROGRAM}").module()'
            return f"import torch\n\n{program}\nfeatures = encoder(image)"
        if TIMM in self.files:
            return f'import timm\n\nencoder = timm.create_model("local-dir:FOLDER/{TIMM}", pretrained=True).eval()'
        return f'from safetensors.torch import load_file\n\nweights = load_file("FOLDER/{MODEL}")  # name -> tensor'


def write_encoder(
    method: nn.Module,
    mean_C11: Tensor,
    std_C11: Tensor,
    size: int,
    out: Path,
    card: Callable[[Written], str] | None = None,
) -> Written:
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


def _write(encoder: Standalone, folder: Path) -> Written:
    backbone, about = getattr(encoder.method, "backbone", None), encoder.reading.describe()
    (image_BCHW,) = encoder.reading.rows(2)
    features_BD = encoder(image_BCHW)
    files, remarks, difference = [], [], 0.0
    try:
        difference = write_program(encoder, folder / PROGRAM, about).difference
        files.append(PROGRAM)
    except UserError as error:
        remarks.append(str(error))
        (folder / PROGRAM).unlink(missing_ok=True)
    if isinstance(backbone, nn.Module):
        if (apart := _write_timm(backbone, encoder, folder / TIMM)) is not None:
            files.append(TIMM)
        else:
            apart = write_safetensors(backbone, folder, {})
            files.append(MODEL)
        difference = max(difference, apart)
    record = {
        "format": "encoder",
        "input": f"float32 [B, {', '.join(map(str, image_BCHW.shape[1:]))}] in [0, 1]",
        "features": features_BD.shape[1],
        "mean": about["mean"],
        "std": about["std"],
        "largest_difference": difference,
    }
    (folder / EXPORT).write_text(json.dumps(record, indent=1) + "\n")
    return Written(files, difference, remarks, about)


def _write_timm(backbone: nn.Module, encoder: Standalone, folder: Path) -> float | None:
    """The largest difference between features and outputs of the network that timm builds from the folder; None, and
    no folder, if timm cannot build it, or the features are not its output.
    """
    (image_BCHW,), moments = encoder.reading.rows(1), encoder.reading.describe()
    network, (height, width) = timm_network(backbone), image_BCHW.shape[2:]
    if network is None or not write_timm(network, (height, width), moments["mean"], moments["std"], folder):
        return None
    again = read_timm(folder)
    compared = compare(encoder, lambda image: again(encoder.reading.standardised(image)))
    if compared.difference <= compared.limit:
        return compared.difference
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
