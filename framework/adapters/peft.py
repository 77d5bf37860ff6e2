"""Adapters out to Hugging Face PEFT and in from it: the folder of a LoRA, adapter_config.json and safetensors.

    save_peft(model, "folder")                       # then, anywhere, without lightspan:
    peft.PeftModel.from_pretrained(pretrained_model, "folder")

Every adapter whose change has low rank is a LoRA: up [O R] and down [R I], with R and alpha written for each layer, so
that nothing is scaled on the other side. Parameters that trained as a whole travel as `modules_to_save`.
"""

import glob
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapted
from lightspan.adapters.inject import READS_WEIGHTS, adapt, adapted_layers, plain_tensors
from lightspan.adapters.layers import LayerShape, whole
from lightspan.adapters.lora import LoRA
from lightspan.adapters.report import Injection
from lightspan.distributed import rank
from lightspan.errors import UserError
from lightspan.files import atomic_path, write_atomic

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
LARGEST = 2**24
"""Most numbers of one layer's lora_A; it grows with the square of a convolution's groups."""
_NO_LORA_WITH = ("use_dora", "layer_replication", "target_parameters", "trainable_token_indices", "megatron_config")


def save_peft(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Writes the adapter of that name as a PEFT LoRA folder, on the first rank; all ranks have to call it.

    Args:
        model: the adapted model, of the class that PEFT will be given: its layers' names go into the folder.
        folder: made if missing.
    Raises: UserError, naming the layer, for a change without low rank or of a layer that PEFT's LoRA cannot run.
    """
    layers = {n: layer for n, layer in adapted_layers(model).items() if name in layer.adapters}
    if not layers:
        raise UserError(f"no layer has an adapter named {name!r}, so there is nothing to write for PEFT")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, module in layers.items():
        _refuse_what_peft_cannot_run(model, layer, module, name)
        adapter = module.adapters[name]
        try:
            up_OR, down_RI = (whole(t).detach() for t in adapter.low_rank())
        except UserError as error:
            raise UserError(f"{layer}: {error}") from error
        if (numbers := down_RI.numel() * adapter.layer.groups**2) > LARGEST:
            raise UserError(
                f"{layer} cannot go into a PEFT LoRA folder: PEFT's lora_A sees all channels of a grouped convolution, "
                f"and would take {numbers:,} numbers; fold it, or leave that layer out"
            )
        down, up = _as_layers(adapter.layer, up_OR, down_RI)
        ranks[layer] = len(down)
        tensors |= {f"{PREFIX}{layer}.lora_A.weight": down, f"{PREFIX}{layer}.lora_B.weight": up}
    saved = _trained_modules(model)
    for module_name in saved:
        state = model.get_submodule(module_name).state_dict()
        tensors |= {f"{PREFIX}{module_name}.{key}": whole(t).detach() for key, t in state.items()}
    if rank() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({key: t.cpu().contiguous().clone() for key, t in tensors.items()}, str(temporary), {"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(_config(model, ranks, saved), indent=2) + "\n")


def load_peft(model: nn.Module, folder: str | Path, name: str = "default", show: bool = True) -> Injection:
    """Adapts a model with the LoRA of a PEFT folder, which may come from PEFT itself.

    Args:
        model: the pretrained model that the folder belongs to, changed in place.
        name: of the adapters.
        show: as of `lightspan.adapters.inject.adapt`.
    Raises: UserError for a folder that is no LoRA or holds more than this can read, and for one of another model.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    known = dict(model.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            others[key.removeprefix(PREFIX)] = tensor
    parameters = dict(plain_tensors(model))
    if foreign := [key for key in others if key not in parameters]:
        raise UserError(f"{folder} holds {foreign[0]}, which {type(model).__name__} has no place for")
    if missing := [layer for layer in pairs if layer not in known]:
        raise UserError(f"{folder} adapts {missing[0]}, which {type(model).__name__} does not have")
    injections = []
    for layer, pair in pairs.items():
        down, up = pair["A"], pair["B"]
        shape = LayerShape.of(known[layer].base if isinstance(known[layer], Adapted) else known[layer])
        up_OR, down_RI = _as_matrices(shape, down, up, f"{folder}, {layer}")
        spec = LoRA(len(down_RI), _scale(config, layer, len(down)) * len(down_RI), config.get("lora_dropout", 0.0))
        injections.append(adapt(model, [glob.escape(layer)], spec, name, show=False))
        adapter: Any = adapted_layers(model)[layer].adapters[name]
        adapter.restore({"up_OR": up_OR, "down_RI": down_RI})
    with torch.no_grad():
        for key, tensor in others.items():
            parameters[key].copy_(tensor)
            if parameters[key].is_floating_point():
                parameters[key].requires_grad_(isinstance(parameters[key], nn.Parameter))
    whole_ones = {key: parameters[key].numel() for key in others if isinstance(parameters[key], nn.Parameter)}
    rows = tuple(row for injection in injections for row in injection.rows)
    injection = Injection(name, rows, whole_ones, injections[-1].total)
    if show:
        injection.print()
    return injection


def _as_layers(shape: LayerShape, up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of PEFT's lora_A and lora_B.

    PEFT's lora_A of a grouped convolution sees all channels, so the factors of all groups stand there block by block.
    """
    if not up_OR.shape[1]:  # nothing is left of the change; PEFT has no rank 0
        up_OR, down_RI = up_OR.new_zeros(len(up_OR), 1), down_RI.new_zeros(1, down_RI.shape[1])
    if shape.linear:
        return down_RI, up_OR
    kernel = down_RI.view(-1, *shape.weight[1:])
    down = kernel.new_zeros(shape.groups, len(kernel), shape.groups, *kernel.shape[1:])
    for group in range(shape.groups):
        down[group, :, group] = kernel
    return down.flatten(2, 3).flatten(0, 1), up_OR.view(*up_OR.shape, *(1,) * len(shape.stride))


def _as_matrices(shape: LayerShape, down: Tensor, up: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The inverse of `_as_layers`. Raises: UserError for a grouped convolution whose groups see each other."""
    if shape.linear:
        return up, down
    channels = shape.weight[1]
    blocks = down.unflatten(0, (shape.groups, -1)).unflatten(2, (shape.groups, channels))
    kernel = blocks[0, :, 0]
    same = all(
        torch.equal(blocks[i, :, j], kernel if i == j else torch.zeros_like(kernel))
        for i in range(shape.groups)
        for j in range(shape.groups)
    )
    if not same:
        raise UserError(
            f"{where}: this LoRA of a grouped convolution mixes its groups, and no change of its weight does"
        )
    return up.flatten(1), kernel.flatten(1)


def _refuse_what_peft_cannot_run(model: nn.Module, layer: str, module: Adapted, name: str) -> None:
    shape = module.adapters[name].layer
    reason = None
    if module.adapters[name].bias_delta() is not None:
        reason = "it changes the bias too"
    elif not shape.linear and (set(shape.dilation) != {1} or shape.padding_mode != "zeros"):
        reason = f"PEFT runs it without dilation={shape.dilation} and padding_mode={shape.padding_mode!r}"
    elif shape.groups**2 * math.prod(shape.weight[1:]) * module.adapters[name].low_rank()[1].shape[0] > LARGEST:
        reason = (
            f"PEFT has no grouped lora_A, and the dense one of {shape.groups} groups takes over {LARGEST:,} numbers"
        )
    elif any(isinstance(p, READS_WEIGHTS) and any(part is module for part in p.modules()) for p in model.modules()):
        reason = "it is part of an attention that reads its weight, where PEFT's LoRA would be passed over"
    if reason:
        raise UserError(f"{layer} cannot go into a PEFT LoRA folder: {reason}; fold it, or leave that layer out")


def _trained_modules(model: nn.Module) -> list[str]:
    """Modules of which every parameter trains as a whole. Raises: UserError for a parameter that trains alone."""
    trained = [name for name, tensor in plain_tensors(model) if tensor.requires_grad]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    for module in modules:
        mine = [name for name in trained if name.rpartition(".")[0] == module]
        if not module or len(mine) < len(list(model.get_submodule(module).parameters())):
            raise UserError(f"{mine[0]} trained by itself, and PEFT saves whole modules; train all of its module")
        if twins := [name for name, _ in model.named_modules() if name != module and name.endswith(module)]:
            raise UserError(f"PEFT would take {twins[0]} for {module}, which trained as a whole; rename one of them")
    return modules


def _config(model: nn.Module, ranks: dict[str, int], saved: list[str]) -> dict[str, Any]:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Patterns are searched for at the end of a name; anchored, they mean one layer.
    unusual = {f"^{re.escape(layer)}": count for layer, count in ranks.items() if count != usual}
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": "|".join(re.escape(layer) for layer in ranks),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no PEFT folder with {CONFIG} and {WEIGHTS}: {error}") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds a PEFT adapter of type {config.get('peft_type')!r}; only LORA can be loaded")
    used = [key for key in _NO_LORA_WITH if config.get(key)]
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        used.append("bias")
    if used:
        raise UserError(f"{folder} uses {', '.join(used)}, which makes it more than a plain LoRA; it cannot be loaded")
    return config, tensors


def _scale(config: dict[str, Any], layer: str, count: int) -> float:
    """What PEFT multiplies the product of the factors by."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), config["lora_alpha"])
    return alpha / (math.sqrt(count) if config.get("use_rslora") else count)
