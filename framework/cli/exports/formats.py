"""The formats of `lightspan export`: each function writes a folder for a run's model; see
`lightspan.cli.exports.products`.

Shapes: B samples, C H W picture, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightspan.adapters.inject import fold
from lightspan.backbones.elastic import ElasticViT
from lightspan.cli.config.build import Built
from lightspan.cli.exports.examples import example_batch
from lightspan.cli.exports.onnx_file import FILE, OUTPUT, Precision, precision_of, write_onnx
from lightspan.cli.exports.products import LOADED_BY_TIMM, Product, program, tensors, timm_folder, write_backbone
from lightspan.cli.exports.standalone import Reading, Standalone, What, compare, largest_difference, reading_of
from lightspan.cli.exports.timm_folder import elastic_backbone, read_timm, sizes_of, timm_network
from lightspan.core.batches import batch_type_of
from lightspan.core.errors import UserError, first_lines, print_notes

EXACT = 1e-6  # of float32 outputs; an exact export has none, another attention kernel less
PROGRAM = "model.pt2"


@dataclass(frozen=True)
class Request:
    """What is exported, and how.

    Attributes:
        built: its model has the weights of the checkpoint.
        origin: recipe and version, for the metadata of files.
        what: features or predictions, for formats that hold a function.
        precision: of stored weights (ONNX); None keeps that of the model.
        shape: C H W of a picture, C D H W of a volume, C T H W of a clip, if the run's data are not to be asked.
        sizes: of the networks to cut out of an elastic one.
        fold: whether adapters are written into the weights of their layers (safetensors; other formats always do).
    """

    built: Built
    origin: dict[str, str]
    what: What = "features"
    precision: Precision | None = None
    shape: tuple[int, ...] | None = None
    sizes: Sequence[str] | None = None
    fold: bool = False


def to_safetensors(request: Request, folder: Path) -> Product:
    """All tensors of the method, under the names that it gives them, or that it has without adapters.

    Raises: UserError as `lightspan.adapters.inject.fold`.
    """
    if request.fold:
        fold(request.built.model)
    return tensors(request.built.model, folder, request.origin)


def to_huggingface(request: Request, folder: Path) -> Product:
    """A folder for transformers: of a backbone of transformers itself, or of one of timm, which transformers reads too.

    Raises: UserError for any other backbone.
    """
    from lightspan.cli.exports.huggingface import (
        is_causal,
        largest_output_difference,
        require_pretrained,
        task_of,
        timm_wrapper,
    )

    model: Any = request.built.model
    fold(model)
    if (backbone := timm_network(getattr(model, "backbone", None))) is not None:
        write_backbone(backbone, reading := _read(_prepared(request)), folder)
        network = timm_wrapper(folder)
        compared = compare(Standalone(model, reading), lambda image: network(reading.standardised(image)).pooler_output)
        how = 'encoder = AutoModel.from_pretrained("FOLDER").eval()\nfeatures = encoder(pixel_values).pooler_output'
        loading = f"from transformers import AutoModel\n\n{how}"
        return Product("transformers", *compared, loading, "transformers", reading.describe(inside=False))
    require_pretrained(model)
    model.backbone.save_pretrained(folder)
    loader = "AutoModelForCausalLM" if is_causal(model.backbone) else "AutoModel"
    loading = f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("FOLDER")'
    difference, task = largest_output_difference(model.backbone, folder), task_of(model.backbone)
    return Product("transformers", difference, EXACT, loading, "transformers", task=task)


def to_peft(request: Request, folder: Path) -> Product:
    """The adapters alone, as a LoRA of Hugging Face PEFT."""
    from lightspan.adapters.peft import save_peft
    from lightspan.cli.exports.huggingface import task_of
    from lightspan.cli.exports.peft_check import adapted_part, largest_difference, require_changes

    part = adapted_part(request.built.model)
    save_peft(part, folder)
    require_changes(part)
    loading = (
        'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "FOLDER")  # base: the frozen network'
    )
    return Product("peft", largest_difference(part, folder), EXACT, loading, "peft", task=task_of(part))


def to_timm(request: Request, folder: Path) -> Product:
    """A folder for timm; of an elastic network one for each size, named by it.

    Raises: UserError for a backbone that timm does not build.
    """
    model: Any = _prepared(request).built.model
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, ElasticViT):
        sizes = sizes_of(backbone, request.sizes)
        reading, difference = _read(request), 0.0
        for size in sizes:
            path = folder / str(size)
            write_backbone(backbone.extract(size), reading, path)
            image_BCHW = reading.standardised(*reading.rows(2))
            with torch.no_grad():
                inside_BD = backbone.tokens(image_BCHW, size)[:, 0]
                difference = max(difference, largest_difference(inside_BD, read_timm(path)(image_BCHW)))
        record, cards = reading.describe(inside=False), tuple(map(str, sizes))
        return Product("timm", difference, EXACT, LOADED_BY_TIMM, "timm", record, cards)
    network = timm_network(backbone)
    if network is None:
        has = "no backbone" if backbone is None else f"a {type(backbone).__name__} as its backbone"
        raise UserError(
            f"timm builds its own networks only, and {type(model).__name__} has {has}; use --to onnx, --to "
            "torch-export or --to safetensors"
        )
    return timm_folder(network, Standalone(model, _read(request)), folder)


def to_torch_export(request: Request, folder: Path) -> Product:
    """A program of torch.export: features, or predictions, of batches of any size."""
    network = Standalone(request.built.model, _read(_prepared(request)), request.what)
    return program(network, folder, PROGRAM, request.origin)


def to_onnx(request: Request, folder: Path) -> Product:
    """One ONNX file: features, or predictions, of batches of any size."""
    precision = request.precision or precision_of(request.built.model)
    reading = _read(_prepared(request))
    record = {"what": request.what, "weights": precision, **reading.describe()}
    network = Standalone(request.built.model, reading, request.what)
    compared = write_onnx(network, folder, precision, {**request.origin, **record})
    feed = ", ".join(f'"{name}": {name}' for name in reading.examples)
    loading = (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/{FILE}")\n'
        f'(output,) = session.run(["{OUTPUT}"], {{{feed}}})  # arrays of NumPy'
    )
    return Product("onnxruntime", *compared, loading, "onnx", record)


def require_sizes(model: nn.Module, sizes: Sequence[str] | None) -> None:
    """Raises: UserError for sizes that the model's backbone does not have."""
    if sizes:
        sizes_of(elastic_backbone(model), sizes)


def _prepared(request: Request) -> Request:
    """The same, its model in the form that is written: without adapters, on the CPU, in float32, without dropout."""
    fold(request.built.model)
    request.built.model.cpu().float().eval()
    return request


def _read(request: Request) -> Reading:
    batch, moments = example_batch(request.built, request.shape)
    kind = batch_type_of(request.built.datamodule, request.built.model)
    reading = reading_of(request.built.model, batch, moments, request.what, _blames_shape(request), kind)
    if reading.moments is None and (names := [name for name, x in reading.examples.items() if x.dim() > 3]):
        print_notes(
            [f"what is written takes {' and '.join(names)} as the data of the run give it, standardised already"]
        )
    return reading


@contextmanager
def _blames_shape(request: Request) -> Iterator[None]:
    """For the call of the method: whatever a network says of inputs that are not for it names --shape."""
    try:
        yield
    except NotImplementedError:  # there is nothing to call, whatever the shape is
        raise
    except Exception as error:
        if request.shape is None:
            raise
        raise UserError(
            f"--shape {','.join(map(str, request.shape))}: {type(request.built.model).__name__} cannot read this "
            f"({first_lines(error)}); give the shape that it was trained on"
        ) from error
