"""Adapters to and from Hugging Face PEFT: the folder of a LoRA, adapter_config.json and safetensors.

    save_peft(model, "folder")                       # then, anywhere, without lightspan:
    peft.PeftModel.from_pretrained(pretrained_model, "folder")

Every adapter whose change has low rank is a LoRA: up [O R] and down [R I], with R and alpha written for each layer, so
that nothing is scaled on the other side. Parameters that trained completely are stored as `modules_to_save`.
"""

import inspect
import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapted, AdapterSpec
from lightspan.adapters.inject import READS_WEIGHTS, adapted_layers, plain_tensors, plan
from lightspan.adapters.layers import LayerShape
from lightspan.adapters.lora import LoRA
from lightspan.adapters.report import Injection
from lightspan.adapters.state import carry_out_loaded, destinations, trained_names, untying, write_tensors
from lightspan.core.distributed import rank
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.places import PathUse
from lightspan.core.files.tensors import stored_tensors
from lightspan.core.sharded import whole

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
LARGEST = 2**24
"""The most numbers in one layer's lora_A; it grows with the square of a convolution's groups."""
_NO_LORA_WITH = ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
_SAFE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's `init_lora_weights` that leave the base weights unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
subtract the adapter's start from them, so that the folder's numbers are meaningless with the pretrained weights.
"""
_OF_STARTS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config")


def save_peft(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Writes the adapter of that name as a PEFT LoRA folder, on the first rank; all ranks must call it.

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
        _warn_of_readers(model, layer)
        adapter = module.adapters[name]
        try:
            up_OR, down_RI = (whole(t).detach() for t in adapter.low_rank())
        except UserError as error:
            raise UserError(f"{layer}: {error}") from error
        if (numbers := down_RI.numel() * adapter.layer.groups**2) > LARGEST:
            raise UserError(
                f"{layer} cannot go into a PEFT LoRA folder: PEFT's lora_A sees all channels of a grouped convolution, "
                f"and would need {numbers:,} numbers; fold it, or leave that layer out"
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
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(_config(model, ranks, saved), indent=2) + "\n")


def load_peft(model: nn.Module, folder: str | Path, name: str = "default", show: bool = True) -> Injection:
    """Adapts a model with the LoRA of a PEFT folder, which may come from PEFT itself.

    Args:
        model: the pretrained model that the folder belongs to, changed in place.
        name: of the adapters.
        show: as in `lightspan.adapters.inject.adapt`.
    Raises: UserError for a folder that is not a LoRA or contains more than this can read, and for one of another model;
    the model is then unchanged.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    known = dict(model.named_modules())
    pairs, others = _sorted(tensors, folder)
    places = destinations(model, others, str(folder))
    _require_all_names(model, places, folder)
    if missing := [layer for layer in pairs if layer not in known]:
        raise UserError(f"{folder} adapts {missing[0]}, which {type(model).__name__} does not have")
    specs: dict[str, AdapterSpec] = {}
    factors = {}
    for layer, pair in pairs.items():
        where = f"{folder}, {layer}"
        try:
            shape = LayerShape.of(known[layer].base if isinstance(known[layer], Adapted) else known[layer])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        up_OR, down_RI = _as_matrices(shape, pair["A"], pair["B"], where)
        count = len(down_RI)
        specs[layer] = LoRA(count, _scale(config, layer, len(pair["A"])) * count, config.get("lora_dropout", 0.0))
        factors[layer] = {"up_OR": up_OR, "down_RI": down_RI}
    planned = plan(model, specs, name, trained_names(model, places))
    for layer, adapter in planned.adapters.items():
        adapter.restore(factors[layer])
    return carry_out_loaded(planned, others, places, show)


class StoredChange:
    """A PEFT LoRA folder as what it changes of weights that no module holds, tensor by tensor.

    Attributes:
        layers: names of the layers whose weight gets a sum added.
        replaced: name -> tensor, of what trained as a whole and stands in place of the base's.
        base: what the folder calls the model it belongs to; may be empty.

    Raises: UserError for a folder that is no LoRA or holds more than this can read.
    """

    def __init__(self, folder: Annotated[Path, PathUse.READ]) -> None:
        self.folder = folder
        self._config, tensors = _read(folder)
        self._pairs, self.replaced = _sorted(tensors, folder)
        self.layers = list(self._pairs)
        self.base = str(self._config.get("base_model_name_or_path") or "")

    def delta(self, layer: str, weight: tuple[int, ...], transposed: bool = False) -> Tensor:
        """What is added to a layer's weight of this shape, in float64.

        Args:
            transposed: whether a matrix is stored as [I O], as transformers' Conv1D does.
        Raises: UserError where the factors belong to a layer of other sizes.
        """
        shape, up_OR, down_RI = self.factors(layer, weight, transposed)
        return shape.shaped(up_OR @ down_RI) * _scale(self._config, layer, len(self._pairs[layer]["A"]))

    def factors(
        self, layer: str, weight: tuple[int, ...], transposed: bool = False
    ) -> tuple[LayerShape, Tensor, Tensor]:
        """How the layer's weight is read as a matrix, and `up` [O R] and `down` [R I] of `delta` before its scale."""
        where = f"{self.folder}, {layer}"
        pair, linear = self._pairs[layer], len(weight) == 2
        if len(weight) < 2 or len(weight) != pair["A"].ndim:
            raise UserError(f"{where}: a LoRA of {pair['A'].ndim} axes does not fit a tensor {list(weight)}")
        groups = 1 if linear else max(1, pair["A"].shape[1] // weight[1])
        shape = LayerShape(weight, linear and transposed, groups, () if linear else (1,) * (len(weight) - 2))
        return shape, *_as_matrices(shape, pair["A"].double(), pair["B"].double(), where)

    def shape(self, layer: str) -> tuple[int, ...]:
        """The shape of the layer's change as the factors alone tell it, a matrix as [O I]."""
        down, up = self._pairs[layer]["A"], self._pairs[layer]["B"]
        # Of a convolution in groups, A reads all channels and B has a part of the rank for each group.
        groups = max(1, len(down) // max(1, up.shape[1])) if down.ndim > 2 else 1
        return (len(up), down.shape[1] // groups, *down.shape[2:])

    def transposes(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether matrices of these layers are stored as [I O]: the folder says so, or one that is not square shows it.

        PEFT itself looks at the layer's class, and folders need not say it.
        """
        sizes = {layer: (len(pair["B"]), pair["A"].shape[1]) for layer, pair in self._pairs.items()}
        shown = any(shapes.get(layer) == (i, o) and i != o for layer, (o, i) in sizes.items())
        return bool(self._config.get("fan_in_fan_out")) or shown


def _sorted(tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(layer -> {"A": ..., "B": ...}, everything else), by their names in the model.

    Raises: UserError for half a pair, for one that is no two factors of a weight, and for another part of a LoRA.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif ".lora_" in key:  # of an embedding, DoRA's magnitudes, or a state that no PEFT has saved
            raise UserError(
                f"{folder} holds {key}, and of a LoRA only NAME.lora_A.weight and NAME.lora_B.weight can be read; save "
                "it with PEFT's save_pretrained as a plain LoRA of linear layers and convolutions"
            )
        else:
            others[key.removeprefix(PREFIX)] = tensor
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            missing = "A" if "B" in pair else "B"
            raise UserError(f"{folder}, {layer}: lora_{missing} is missing, so the folder is not whole")
        down, up = pair["A"], pair["B"]
        sizes = (*down.shape[1:], *up.shape[:1])  # a rank of 0 is one
        if min(down.ndim, up.ndim) < 2 or 0 in sizes or down.is_complex() or up.is_complex():
            raise UserError(
                f"{folder}, {layer}: lora_A {list(down.shape)} of {down.dtype} and lora_B {list(up.shape)} of "
                f"{up.dtype} are not the factors of a weight; save the folder again from PEFT"
            )
    return pairs, others


def _require_all_names(model: nn.Module, places: dict[str, Tensor], folder: Path) -> None:
    """Raises: UserError for a tensor that several modules share, of which PEFT would change one and separate it from
    the others.
    """
    for key, place in places.items():
        names = [name for name, tensor in plain_tensors(model, every_name=True) if tensor is place]
        if absent := [name for name in names if name not in places]:
            raise UserError(
                f"{folder} changes only {key}, which is the same tensor as {absent[0]} in this {type(model).__name__}; "
                f"PEFT would separate them, so {untying(absent[0])}"
            )


def _as_layers(shape: LayerShape, up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of PEFT's lora_A and lora_B.

    PEFT's lora_A of a grouped convolution sees all channels, so it contains the factors of all groups block by block.
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
    """The inverse of `_as_layers`, with a rank that a change of the weight can have.

    Raises: UserError for a layer of other sizes, and a grouped convolution whose groups are mixed.
    """
    count, ones = len(down), (1,) * len(shape.stride)
    inputs = (shape.fan_in,) if shape.linear else (shape.groups * shape.weight[1], *shape.weight[2:])
    if down.shape[1:] != inputs or up.shape != (shape.out_features, count // shape.groups, *ones):
        sizes = f"lora_A {list(down.shape)} and lora_B {list(up.shape)}"
        raise UserError(f"{where}: {sizes} belong to a layer of other sizes than {list(shape.weight)}")
    if shape.linear:
        return _of_largest_rank(shape, up, down)
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
            f"{where}: this LoRA of a grouped convolution mixes its groups, which no change of its weight can do"
        )
    return _of_largest_rank(shape, up.flatten(1), kernel.flatten(1))


def _of_largest_rank(shape: LayerShape, up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors no thicker than the weight's shorter side: PEFT's may be thicker."""
    if len(down_RI) <= shape.largest_rank:
        return up_OR, down_RI
    change_OI, identity = up_OR @ down_RI, torch.eye(shape.largest_rank).to(up_OR)
    return (identity, change_OI) if shape.out_features == len(identity) else (change_OI, identity)


def _refuse_what_peft_cannot_run(model: nn.Module, layer: str, module: Adapted, name: str) -> None:
    shape = module.adapters[name].layer
    reason = None
    if module.adapters[name].bias_delta() is not None:
        reason = "it changes the bias too"
    elif not shape.linear and (set(shape.dilation) != {1} or shape.padding_mode != "zeros"):
        reason = f"PEFT runs it without dilation={shape.dilation} and padding_mode={shape.padding_mode!r}"
    elif shape.groups**2 * math.prod(shape.weight[1:]) * module.adapters[name].low_rank()[1].shape[0] > LARGEST:
        reason = (
            f"PEFT has no grouped lora_A, and the dense one of {shape.groups} groups needs over {LARGEST:,} numbers"
        )
    elif any(isinstance(p, READS_WEIGHTS) and any(part is module for part in p.modules()) for p in model.modules()):
        reason = "it is part of an attention that reads its weight, where PEFT's LoRA would be ignored"
    if reason:
        raise UserError(f"{layer} cannot go into a PEFT LoRA folder: {reason}; fold it, or leave that layer out")


def _warn_of_readers(model: nn.Module, layer: str) -> None:
    """Warns if a forward pass reads a convolution's geometry, as Whisper's encoder does: PEFT's layers do not
    have it, so that such a model fails with any LoRA of that layer, even PEFT's own.
    """
    place, _, attribute = layer.rpartition(".")
    parent = model.get_submodule(place)
    code = getattr(inspect.unwrap(type(parent).forward), "__code__", None)
    names = set(code.co_names) if code else set()
    if attribute in names and (read := sorted(names & {"stride", "padding", "dilation", "groups"})):
        warnings.warn(
            f"{type(parent).__name__} seems to read {attribute}.{read[0]}, which a layer of PEFT does not have; if the "
            f"model fails under PEFT, fold the adapters or leave {layer} out",
            stacklevel=3,
        )


def _trained_modules(model: nn.Module) -> list[str]:
    """Modules of which every parameter trains completely, each by its own name if several share one tensor: PEFT
    gives every module in its list its own copy, so that all of them must be listed. Raises: UserError for a
    parameter that trains without the rest of its module.
    """
    trained = [name for name, tensor in plain_tensors(model, every_name=True) if tensor.requires_grad]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    for module in modules:
        mine = [name for name in trained if name.rpartition(".")[0] == module]
        if isinstance(model.get_submodule(module), Adapted):
            raise UserError(
                f"{mine[0]} trained completely and {module} also has an adapter, but a PEFT folder has one of both; "
                f"train one of them, or if another module shares this weight, {untying(mine[0])}"
            )
        if not module or len(mine) < len(list(model.get_submodule(module).parameters())):
            raise UserError(f"{mine[0]} trained by itself, but PEFT saves whole modules; train its whole module")
        # PEFT copies what it mistakes for a trained module, which changes nothing of one without numbers (an Identity).
        mistaken = [name for name, part in model.named_modules() if name != module and part.state_dict()]
        if twins := [name for name in mistaken if name.endswith(module)]:
            raise UserError(f"PEFT would mistake {twins[0]} for {module}, which trained completely; rename one of them")
    return modules


def _task(model: Any) -> str | None:
    """What PEFT's AutoPeftModelForCausalLM asks for; None for networks that do not write text from left to right."""
    can_generate = getattr(model, "can_generate", None)
    writes = callable(can_generate) and can_generate() and not model.config.is_encoder_decoder
    return "CAUSAL_LM" if writes else None


def _config(model: nn.Module, ranks: dict[str, int], saved: list[str]) -> dict[str, Any]:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Patterns match at the end of a name; anchored, they mean exactly one layer.
    unusual = {f"^{re.escape(layer)}": count for layer, count in ranks.items() if count != usual}
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
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
        config = settings_object(folder / CONFIG)
    except ValueError as error:
        raise UserError(
            f"{folder} is not a PEFT folder with {CONFIG} and {WEIGHTS}: {CONFIG} holds no settings of an adapter: "
            f"{error}; save the folder again from PEFT"
        ) from error
    tensors, _ = stored_tensors(folder / WEIGHTS, "save the folder again from PEFT")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{folder} contains a PEFT adapter of type {config.get('peft_type')!r}; only LORA can be loaded"
        )
    used = [
        key
        for key, value in config.items()
        if value
        and key not in _OF_STARTS
        and (key in _NO_LORA_WITH or key.endswith("_config") or (key.startswith("use_") and key != "use_rslora"))
    ]
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        used.append("bias")
    if used:
        raise UserError(f"{folder} uses {', '.join(used)}, which makes it more than a plain LoRA; it cannot be loaded")
    if (start := config.get("init_lora_weights")) not in _SAFE_STARTS:
        raise UserError(
            f"{folder} was made with init_lora_weights={start!r}, which changes the base weights at the start, and "
            "those are not in the folder; write it again from PEFT with "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        )
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(map(_is_number, (config.get("lora_alpha"), *alphas.values()))):
        raise UserError(
            f"{folder / CONFIG} has lora_alpha={config.get('lora_alpha')!r} and alpha_pattern={alphas!r:.80}, which "
            "must be a finite number and numbers by pattern; save the folder again from PEFT"
        )
    try:
        for pattern in alphas:
            re.compile(pattern)
    except re.error as error:
        raise UserError(f"{folder / CONFIG} has an alpha_pattern {pattern!r:.80} that is none: {error}") from error
    return config, tensors


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _scale(config: dict[str, Any], layer: str, count: int) -> float:
    """What PEFT multiplies the product of the factors by."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), config["lora_alpha"])
    if not count:
        return 0.0  # factors without a rank change nothing
    return alpha / (math.sqrt(count) if config.get("use_rslora") else count)
