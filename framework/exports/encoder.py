"""A method's encoder as files that need no lightspan: a torch.export program, and a timm folder where timm knows it.

Shapes: B pictures, C H W, D features.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from lightspan.errors import one_line
from lightspan.exports.folder import whole_folder
from lightspan.exports.safetensors import write_safetensors
from lightspan.exports.timm_folder import KEPT
from lightspan.files import remove
from lightspan.run_files import EXPORT, MODEL

PROGRAM, TIMM = "encoder.pt2", "timm"
ROWS, SEED = 2, 0  # torch.export takes a batch of one for a constant


class PictureEncoder(nn.Module):
    """Pictures in [0, 1], [B C H W] -> features [B D]: standardises them, and calls `method.features`."""

    mean: Tensor
    std: Tensor

    def __init__(self, method: nn.Module, mean_C11: Tensor, std_C11: Tensor) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("mean", mean_C11.clone())
        self.register_buffer("std", std_C11.clone())

    def forward(self, image_BCHW: Tensor) -> Tensor:
        batch = {"image": (image_BCHW - self.mean) / self.std}
        features_BD: Tensor = self.method.features(batch)  # type: ignore[operator]
        return features_BD


class Written(NamedTuple):
    """What was written into the folder, the largest difference of features read back, and what could not be written."""

    files: list[str]
    difference: float
    remarks: list[str]


def write_encoder(method: nn.Module, mean_C11: Tensor, std_C11: Tensor, size: int, out: Path) -> Written:
    """Writes a folder, or replaces that of an earlier export, with

    - encoder.pt2: `torch.export.load(PATH).module()(images)`, images float32 [B, C, size, size] in [0, 1], any B. What
      `features` does not use, such as a projector, is left out.
    - timm/: `timm.create_model("local-dir:FOLDER/timm", pretrained=True)`, of standardised images; or, for a backbone
      that timm did not build, model.safetensors: its weights.
    - export.json: form of input and features, mean and deviation.

    Args:
        method: has `features(batch)`; its modes of training are restored.
        mean_C11, std_C11: of the pictures that it was trained on.
    """
    modes = [(part, part.training) for part in method.modules()]
    encoder = PictureEncoder(method, mean_C11, std_C11)
    try:
        with torch.no_grad(), _on_cpu(encoder.eval()), whole_folder(out) as folder:
            return _write(encoder, size, folder)
    finally:
        for part, training in modes:
            part.training = training


def _write(encoder: PictureEncoder, size: int, folder: Path) -> Written:
    channels, backbone = len(encoder.mean), getattr(encoder.method, "backbone", None)
    generator = torch.Generator().manual_seed(SEED)
    image_BCHW = torch.rand(ROWS + 1, channels, size, size, generator=generator)
    features_BD = encoder(image_BCHW)
    files, remarks, difference = [], [], 0.0
    try:
        torch.export.save(_without_unused(encoder, image_BCHW[:ROWS]), folder / PROGRAM)
    except Exception as error:  # it raises whatever the code that it traces meets
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remarks.append(f"torch.export cannot write this encoder: {one_line(lines[0])[:200]}")
        (folder / PROGRAM).unlink(missing_ok=True)
    else:
        files.append(PROGRAM)
        again_BD = torch.export.load(folder / PROGRAM).module()(image_BCHW)
        difference = float((again_BD - features_BD).abs().amax())
    if isinstance(backbone, nn.Module):
        if _timm_built(backbone) and _write_timm(backbone, encoder, size, folder / TIMM):
            files.append(TIMM)
        else:
            difference = max(difference, write_safetensors(backbone, folder, {}))
            files.append(MODEL)
    record = {
        "format": "encoder",
        "input": f"float32 [B, {channels}, {size}, {size}] in [0, 1]",
        "features": features_BD.shape[1],
        "mean": encoder.mean.flatten().tolist(),
        "std": encoder.std.flatten().tolist(),
        "largest_difference": difference,
    }
    (folder / EXPORT).write_text(json.dumps(record, indent=1) + "\n")
    return Written(files, difference, remarks)


def _without_unused(encoder: PictureEncoder, image_BCHW: Tensor) -> torch.export.ExportedProgram:
    """The program without the parts of the method that it does not use; torch.export would write their weights too."""

    def program() -> torch.export.ExportedProgram:
        return torch.export.export(encoder, (image_BCHW,), dynamic_shapes=({0: torch.export.Dim("batch")},))

    first, parts = program(), encoder.method._modules
    inputs = {**first.graph_signature.inputs_to_parameters, **first.graph_signature.inputs_to_buffers}
    used = {inputs[node.name] for node in first.graph.nodes if node.users and node.name in inputs}
    unused = {name: part for name, part in parts.items() if not any(x.startswith(f"method.{name}.") for x in used)}
    try:
        parts.update(dict.fromkeys(unused))
        return program()
    finally:
        parts.update(unused)


@contextlib.contextmanager
def _on_cpu(encoder: nn.Module) -> Iterator[None]:
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    try:
        encoder.cpu()
        yield
    finally:
        encoder.to(device)


def _timm_built(backbone: nn.Module) -> bool:
    cfg = getattr(backbone, "pretrained_cfg", None)
    return isinstance(cfg, dict) and bool(cfg.get("architecture")) and type(backbone).__module__.startswith("timm.")


def _write_timm(backbone: Any, encoder: PictureEncoder, size: int, folder: Path) -> bool:
    """Whether timm builds the same network from the folder; it cannot if its first layer, say, was replaced."""
    channels, cfg = len(encoder.mean), backbone.pretrained_cfg
    moments = {"mean": tuple(encoder.mean.flatten().tolist()), "std": tuple(encoder.std.flatten().tolist())}
    try:
        backbone.pretrained_cfg = {key: cfg[key] for key in KEPT if key in cfg}
        save_for_hf(
            backbone,
            str(folder),
            model_args={"in_chans": channels, "num_classes": 0}
            | ({"img_size": size} if hasattr(backbone, "patch_embed") else {}),
            safe_serialization=True,
            data_config={"input_size": (channels, size, size), **moments},
        )
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    except (RuntimeError, TypeError):
        remove(folder)
        return False
    finally:
        backbone.pretrained_cfg = cfg
    now = backbone.state_dict()
    return again.keys() == now.keys() and all(torch.equal(again[name], tensor) for name, tensor in now.items())
