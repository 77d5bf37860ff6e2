"""What exports consist of: tensors, a program, a folder for timm. Each is written, read back with the library that
others will use, and says how to load it.

Shapes: B samples, C H W picture, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightspan.cli.exports.program import write_program
from lightspan.cli.exports.safetensors import write_safetensors
from lightspan.cli.exports.standalone import Reading, Standalone, compare
from lightspan.cli.exports.timm_folder import read_timm, write_timm
from lightspan.core.errors import UserError
from lightspan.core.files.runs import MODEL

LOADED_BY_TIMM = 'import timm\n\nencoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
UNKNOWN = 0.5  # mean and deviation of pictures of which neither is known


@dataclass(frozen=True)
class Product:
    """What was written.

    Attributes:
        reader: the library that read it back.
        difference: the largest one of outputs, or of tensors, after reading back.
        limit: the largest that is accepted.
        loading: Python that loads it; FOLDER stands for the folder.
        library: the Hub's name of the library that loads it, if it has one.
        record: plain values for export.json: form of the inputs and the like.
        cards: the folders that others may publish, inside that of the export.
        task: what the Hub calls its use; None for that of the recipe's modality.
    """

    reader: str
    difference: float
    limit: float
    loading: str
    library: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    cards: tuple[str, ...] = (".",)
    task: str | None = None


def tensors(module: nn.Module, folder: Path, origin: Mapping[str, str]) -> Product:
    """All tensors of a module, under the names that it gives them, with `origin` in the file's metadata."""
    difference = write_safetensors(module, folder, dict(origin))
    loading = f'from safetensors.torch import load_file\n\nweights = load_file("FOLDER/{MODEL}")  # name -> tensor'
    return Product("safetensors", difference, 0.0, loading)


def program(network: Standalone, folder: Path, name: str, origin: Mapping[str, str]) -> Product:
    """A program of torch.export of batches of any size, as the file `name`, with `origin` inside.

    Raises: UserError for a method whose Python torch cannot follow.
    """
    about = {"what": network.what, **network.reading.describe()}
    compared = write_program(network, folder / name, {**origin, **about})
    function, output = ("encoder", "features") if network.what == "features" else ("model", "output")
    loaded = f'{function} = torch.export.load("FOLDER/{name}").module()'
    called = f"{output} = {function}({', '.join(network.reading.examples)})"
    return Product("torch.export", *compared, f"import torch\n\n{loaded}\n{called}", None, about)


def timm_folder(backbone: nn.Module, network: Standalone, folder: Path) -> Product:
    """The backbone of a method as a folder for timm.

    Args:
        backbone: as `timm_network` gives it.
        network: the method, whose features are compared with what timm builds.
    Raises: UserError as `write_backbone`.
    """
    reading = network.reading
    write_backbone(backbone, reading, folder)
    again = read_timm(folder)
    compared = compare(network, lambda image: again(reading.standardised(image)))
    return Product("timm", *compared, LOADED_BY_TIMM, "timm", reading.describe(inside=False))


def write_backbone(backbone: nn.Module, reading: Reading, folder: Path) -> None:
    """Writes a network of timm as timm's folder. Raises: UserError where no arguments build it, or it reads other than
    pictures.
    """
    pictures = [x for x in reading.examples.values() if x.ndim == 4 and x.is_floating_point()]
    if len(pictures) != 1 or len(reading.examples) != 1:
        raise UserError(f"timm's networks read pictures alone, and this method reads {', '.join(reading.examples)}")
    channels, height, width = pictures[0].shape[1:]
    described = reading.describe()
    mean, std = (described.get(key, [UNKNOWN] * channels) for key in ("mean", "std"))
    if not write_timm(backbone, (height, width), mean, std, folder):
        raise UserError(
            f"timm.create_model has no arguments that build this {type(backbone).__name__}: a layer of it was "
            "replaced; use --to onnx, --to torch-export or --to safetensors"
        )
